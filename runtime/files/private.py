"""Folders and files that only this user can write. Trusted files, such as engines, are read from nowhere else.

No function here follows a link, so the file that was checked is the file that is read.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path

from ..errors import ArtifactRefused, EnvironmentFailed

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def user_folder(variable: str, default: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder `flexvar` in one of the user's base directories. Raises EnvironmentFailed without a home directory."""
    base = environ.get(variable, "")
    if os.path.isabs(base):  # the specification ignores relative ones
        return Path(base, "flexvar")
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home):
        raise EnvironmentFailed(
            "This user has no home directory.", expected=f"HOME or {variable}", fix=f"Set {variable} to a folder."
        )
    return Path(home, default, "flexvar")


def check_private(folder: Path) -> None:
    """Raise ArtifactRefused if another user can write in a folder, OSError if it does not exist."""
    info = os.lstat(folder)
    if not stat.S_ISDIR(info.st_mode):
        got, fix = "is not a directory", "Remove it."
    elif hasattr(os, "geteuid") and info.st_uid != os.geteuid():
        got, fix = f"belongs to user {info.st_uid}", "Set XDG_STATE_HOME and XDG_CACHE_HOME to folders of your own."
    elif os.name != "nt" and info.st_mode & 0o022:
        got = f"is writable by others (mode {stat.S_IMODE(info.st_mode):o})"
        fix = f"Run: {shlex.join(['chmod', '700', str(folder)])}"
    else:
        return
    raise ArtifactRefused(f"{folder} {got}.", expected="a folder in which only this user writes", fix=fix)


def make_private(folder: Path) -> None:
    """Make a folder that only this user reads and writes, or check that it is one.

    Raises ArtifactRefused, EnvironmentFailed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        check_private(folder)
    except OSError as error:
        raise EnvironmentFailed(
            f"The folder {folder} cannot be made ({error.strerror or error}).",
            expected="a folder that can be made",
            fix="Free space or correct the permissions.",
        ) from error


@contextmanager
def open_unlinked(path: Path) -> Iterator[tuple[BufferedReader, os.stat_result]]:
    """Open a file without following a link. Yields the file and its status. Raises OSError."""
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
            raise ArtifactRefused(
                f"{path.name} is not a regular file that only this user can write.",
                expected="a regular file that only this user can write",
                fix="Remove it.",
            )
        return file.read(limit)
