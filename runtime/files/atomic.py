"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from ..errors import InvalidInput
from .temporary import remove_leftovers, temporary

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}


def already_exists(final: Path) -> InvalidInput:
    """The error for a name that is taken."""
    return InvalidInput(f"{final} exists already.", expected="a new name", fix="Choose another name, or pass --force.")


def require_regular(path: Path) -> None:
    """Raise InvalidInput if a name is that of a device, a pipe or a socket. Links are right: they are replaced."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # there is nothing, or writing will say why it fails
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise InvalidInput(f"{path} is no regular file.", expected="a regular file", fix="Choose another name.")


def require_parent(final: Path) -> None:
    """Raise InvalidInput unless `final` is a name in an existing directory."""
    if not final.name or not os.path.isdir(final.parent):
        expected, fix = "a name in an existing directory", f"Run: {shlex.join(['mkdir', '-p', str(final.parent)])}"
        raise InvalidInput(f"{final} is not {expected}.", expected=expected, fix=fix)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut.

    Some file systems, such as network and shared folders, cannot sync directories. There this does nothing for them,
    and neither does it for a directory that this user may write but not read.
    """
    directory = path.is_dir()
    if directory and (os.name == "nt" or not os.access(path, os.R_OK)):
        return  # it cannot be opened
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if not directory or error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, with its suffix. At the end the file is renamed to `path`.

    The file is fsynced first. After an exception in the body neither name exists. Without `force` an existing `path` is
    refused, also if it appears while the body runs. A link at `path` is replaced, never followed. The first call for a
    folder in a process also removes what killed processes left there. Raises InvalidInput.
    """
    final = Path(os.path.abspath(path))
    require_parent(final)
    if os.path.isdir(final) and not os.path.islink(final):
        raise InvalidInput(f"{final} is a directory.", expected="the name of a file", fix="Name a file in it.")
    require_regular(final)
    if not force and os.path.lexists(final):
        raise already_exists(final)
    _remove_leftovers_once(final.parent)
    with temporary(final, suffix=final.suffix) as partial:
        yield partial
        fsync(partial)
        if force:
            os.replace(partial, final)
        else:
            _rename_new(partial, final)
        fsync(final.parent)


_remove_leftovers_once = cache(remove_leftovers)  # a folder may hold many thousands of pictures


def _rename_new(partial: Path, final: Path) -> None:
    """Rename unless `final` exists. link(2) does not replace a file, but some file systems have no links."""
    try:
        if os.name == "nt":
            os.rename(partial, final)
        else:
            os.link(partial, final)
    except FileExistsError:
        raise already_exists(final) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _claim(final)
        try:
            os.replace(partial, final)
        except OSError:
            final.unlink()
            raise


def _claim(final: Path) -> None:
    """Create `final` as an empty file. If the process is killed before it is replaced, the empty file stays."""
    try:
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        raise already_exists(final) from None
