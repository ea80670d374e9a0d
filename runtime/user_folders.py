"""Folders of this user alone, where what is trusted lies: who else could write in them decides whether it is.

Nothing here follows a link: what is looked at is what is read.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path

from .errors import ArtifactRefused, EnvironmentFailed

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def user_folder(variable: str, default: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder `flexvar` in one of the user's base directories. Raises EnvironmentFailed without a home."""
    base = environ.get(variable, "")
    if os.path.isabs(base):  # the specification ignores relative ones
        return Path(base, "flexvar")
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home):
        raise EnvironmentFailed("no home directory", expected=f"HOME or {variable}", fix=f"set {variable}")
    return Path(home, default, "flexvar")


def check_private(folder: Path) -> None:
    """Refuse a folder in which somebody else could write. Raises ArtifactRefused; OSError where there is none."""
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode):
        got, fix = "no directory", "remove it"
    elif hasattr(os, "geteuid") and info.st_uid != os.geteuid():
        got, fix = f"owned by user {info.st_uid}", "set XDG_STATE_HOME and XDG_CACHE_HOME to folders of your own"
    elif os.name != "nt" and info.st_mode & 0o022:
        got, fix = (
            f"writable by others (mode {stat.S_IMODE(info.st_mode):o})",
            shlex.join(["chmod", "700", str(folder)]),
        )
    else:
        return
    raise ArtifactRefused(f"{folder}, {got}", expected="a folder in which only this user writes", fix=fix)


@contextmanager
def open_unlinked(path: Path) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    """A file, no link followed, and what it is: of that very file, whatever bears its name by now. Raises OSError."""
    fd = os.open(path, _READ_FLAGS)
    try:
        yield BufferedReader(FileIO(fd, closefd=False)), os.fstat(fd)
    finally:
        os.close(fd)


def read_private(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file that only this user can have written. Raises ArtifactRefused, OSError."""
    with open_unlinked(path) as (file, info):
        foreign = hasattr(os, "geteuid") and info.st_uid != os.geteuid()
        if not stat.S_ISREG(info.st_mode) or foreign or (os.name != "nt" and info.st_mode & 0o022):
            raise ArtifactRefused(path.name, expected="a regular file of this user alone", fix="remove it")
        return file.read(limit)
