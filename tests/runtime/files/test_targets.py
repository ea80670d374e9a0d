"""Places that cannot be written are refused before the work."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.errors import EnvironmentFailed, InvalidInput
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.targets import check_files, make_writable, require_utf8, require_writable
from flexvar_runtime.files.temporary import sibling


@pytest.mark.parametrize("name", ["x" * 240 + ".png", "é" * 120 + ".png", "x" * 255, "a." + "x" * 250, "\udce9" * 250])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    for kind in ("partial", "old"):
        assert len(os.fsencode(sibling(tmp_path / name, kind, Path(name).suffix).name)) <= 255
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_bytes(b"new")
    assert os.listdir(tmp_path) == [name]


def test_a_short_name_is_not_cut(tmp_path: Path) -> None:
    assert sibling(tmp_path / "a.png", "partial", ".png").name.startswith(f".a.png.partial-{os.getpid()}-")


@pytest.mark.parametrize(
    "names",
    [("a", "a"), ("d/a", "link/a"), ("d", "d/a"), ("d/a", "d"), ("d/../a", "a"), ("x" * 256,), ("loop/a", "loop")],
)
def test_names_that_files_cannot_get(tmp_path: Path, names: tuple[str, ...]) -> None:
    """The same name twice, a folder of another result, a name that is too long, a link to itself."""
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput):
        check_files([tmp_path / name for name in names], force=False)


def test_force_replaces_files_and_no_directories(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "d").mkdir()
    check_files([tmp_path / "a", tmp_path / "new/b"], force=True)
    for name, force in (("a", False), ("d", True)):
        with pytest.raises(InvalidInput, match=name):
            check_files([tmp_path / name], force)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    elif os.geteuid():
        pytest.skip("devices cannot be made here (this needs root)")
    else:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    before = os.lstat(path)
    with pytest.raises(InvalidInput, match="no regular file"):
        check_files([path], force=True)
    with pytest.raises(InvalidInput, match="no regular file"), atomic_write(path, force=True):
        pass
    assert os.lstat(path) == before
    (tmp_path / "link").symlink_to("a")  # a link is replaced, not followed
    with atomic_write(tmp_path / "link", force=True):
        pass
    assert os.lstat(path) == before


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/deeper"])
def test_a_file_where_a_directory_should_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="a file has that name"):
        make_writable(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("missing", "mkdir -p"), ("missing/below", "mkdir -p"), ("file", "file is a file"), ("file/b", "file is a file")],
)
def test_a_directory_that_is_not_there(tmp_path: Path, name: str, fault: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match=fault):
        require_writable(tmp_path / name)


@pytest.mark.parametrize(("name", "right"), [("фото/a", True), ("caf\udce9/a", False), ("\udcff", False)])
def test_libraries_open_only_paths_in_utf8(name: str, right: bool) -> None:
    with nullcontext() if right else pytest.raises(EnvironmentFailed, match="UTF-8"):
        require_utf8(Path(name), "A library")


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Found by writing: the permissions of a directory do not say that its file system is full or read-only."""

    def open_(path: Path, *arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(EnvironmentFailed, match=os.strerror(code)):
            require_writable(tmp_path)
    make_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []
