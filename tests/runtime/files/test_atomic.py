"""Files appear whole or not at all, whoever else writes them and however writing ends."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.atomic import atomic_write


def _no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no links here")


@pytest.fixture(params=["links", "no links"])
def any_file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no links":
        monkeypatch.setattr(os, "link", _no_links)


def test_the_file_appears_at_the_end_only(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"  # writers choose their format by it, or append their own
        assert not (tmp_path / "a.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_nothing(tmp_path: Path, force: bool) -> None:
    def interrupted() -> None:
        with atomic_write(tmp_path / "a.png", force=force) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(InvalidInput, match=r"a\.png .*--force"):
        atomic_write(path).__enter__()
    assert path.read_bytes() == b"old"
    with atomic_write(path, force=True) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


@pytest.mark.usefixtures("any_file_system")
def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"

    def overtaken() -> None:
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"mine")
            path.write_bytes(b"theirs")

    with pytest.raises(InvalidInput, match=r"a\.png "):
        overtaken()
    assert path.read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("any_file_system")
def test_of_many_writers_one_wins_and_the_others_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def write(i: int) -> bool:
        try:
            with atomic_write(path) as temporary:
                temporary.write_bytes(bytes([i]) * 1000)
        except InvalidInput:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(32)))
    assert won.count(True) == 1
    assert path.read_bytes() == bytes([won.index(True)]) * 1000
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("any_file_system")
def test_file_systems_without_links_are_served(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_replacement_gives_the_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(os, "replace", _no_links)
    with pytest.raises(OSError, match="no links here"), atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_link_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="disk full"), atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def recorded(name: str) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*arguments: object) -> None:
            order.append(name)
            real(*arguments)

        return call

    for name in ("fsync", "link"):
        monkeypatch.setattr(os, name, recorded(name))
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert order == ["fsync", "link", "fsync"]  # the file, its name, the directory


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "a.png").symlink_to(tmp_path / "target")
    with pytest.raises(InvalidInput, match=r"a\.png "):
        atomic_write(tmp_path / "a.png").__enter__()
    with atomic_write(tmp_path / "a.png", force=True) as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "target").read_bytes() == b"target"
    assert not (tmp_path / "a.png").is_symlink()


def test_directories_are_refused_and_missing_ones_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=tmp_path.name):
        atomic_write(tmp_path, force=True).__enter__()
    with pytest.raises(InvalidInput, match=r"a\.png .*mkdir -p .*none"):
        atomic_write(tmp_path / "none" / "a.png").__enter__()


def _failing_sync(monkeypatch: pytest.MonkeyPatch, code: int, *, directories: bool) -> None:
    """fsync fails with an error for directories, or for regular files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == directories:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_file_systems_that_cannot_sync_directories_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    _failing_sync(monkeypatch, code, directories=True)
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "a.png").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("code", "directories"), [(errno.EIO, True), (errno.EIO, False), (errno.EINVAL, False), (errno.ENOSPC, True)]
)
def test_other_errors_of_fsync_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, directories: bool
) -> None:
    _failing_sync(monkeypatch, code, directories=directories)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))), atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_bytes(b"new")
    assert [path.name for path in tmp_path.iterdir()] == (["a.png"] if directories else [])
