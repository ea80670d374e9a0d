"""Files of a training run appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from flexvar_ref.files import write_whole


def _failing_sync(monkeypatch: pytest.MonkeyPatch, code: int, *, folders: bool) -> None:
    """fsync fails with an error for folders, or for regular files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_file_systems_that_cannot_sync_folders_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    _failing_sync(monkeypatch, code, folders=True)
    with write_whole(tmp_path / "model.json") as partial:
        partial.write_bytes(b"new")
    assert (tmp_path / "model.json").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("code", "folders"), [(errno.EIO, True), (errno.EIO, False), (errno.EINVAL, False)])
def test_other_errors_of_fsync_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, folders: bool
) -> None:
    _failing_sync(monkeypatch, code, folders=folders)
    with pytest.raises(OSError, match=os.strerror(code)), write_whole(tmp_path / "model.json") as partial:
        partial.write_bytes(b"new")
    assert not (tmp_path / ".model.json.partial").exists()


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".model.json.partial").write_bytes(b"half of something longer")
    with write_whole(tmp_path / "model.json") as partial:
        partial.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    assert (tmp_path / "model.json").read_bytes() == b"new"


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(b"old")

    def interrupted() -> None:
        with write_whole(tmp_path / "model.json") as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    assert (tmp_path / "model.json").read_bytes() == b"old"
