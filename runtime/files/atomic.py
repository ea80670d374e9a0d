"""Files that are written completely or not at all."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InvalidInput

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}
_LONGEST_NAME = 255  # bytes, on nearly all file systems


def sibling(final: Path, kind: str, suffix: str = "") -> Path:
    """An unused hidden name beside `final`: `.<name>.<kind>-<pid>-<random><suffix>`.

    A long name is cut, so that file systems take the result. A long suffix is left out.
    """
    tail = f".{kind}-{os.getpid()}-{os.urandom(6).hex()}{suffix if len(os.fsencode(suffix)) <= 20 else ''}"
    return final.with_name(f".{_cut(final.name, _LONGEST_NAME - 1 - len(os.fsencode(tail)))}{tail}")


def _cut(name: str, most: int) -> str:
    """The beginning of a name, of at most `most` bytes."""
    while len(os.fsencode(name)) > most:
        name = name[: min(most, len(name) - 1)]
    return name


def already_exists(final: Path) -> InvalidInput:
    """The error for a name that is taken."""
    return InvalidInput(f"{final} exists already.", expected="a new name", fix="Choose another name, or pass --force.")


def require_parent(final: Path) -> None:
    """Raise InvalidInput unless `final` is a name in an existing directory."""
    if not final.name or not final.parent.is_dir():
        expected, fix = "a name in an existing directory", f"Run: {shlex.join(['mkdir', '-p', str(final.parent)])}"
        raise InvalidInput(f"{final} is not {expected}.", expected=expected, fix=fix)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path` with its suffix. At the end the file of that name is renamed to `path`.

    The file is fsynced first. After an exception in the body neither name exists. Without `force` an existing `path` is
    refused, also if it appears while the body runs. A link at `path` is replaced, never followed. Raises InvalidInput.
    """
    final = Path(os.path.abspath(path))
    require_parent(final)
    if final.is_dir() and not final.is_symlink():
        raise InvalidInput(f"{final} is a directory.", expected="the name of a file", fix="Name a file in it.")
    if not force and os.path.lexists(final):
        raise already_exists(final)
    temporary = sibling(final, "partial", final.suffix)
    try:
        yield temporary
        fsync(temporary)
        if force:
            os.replace(temporary, final)
        else:
            _rename_new(temporary, final)
        fsync(final.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _rename_new(temporary: Path, final: Path) -> None:
    """Rename unless `final` exists. link(2) does not replace a file, but some file systems have no links."""
    try:
        if os.name == "nt":
            os.rename(temporary, final)
        else:
            os.link(temporary, final)
    except FileExistsError:
        raise already_exists(final) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _claim(final)
        try:
            os.replace(temporary, final)
        except OSError:
            final.unlink()
            raise


def _claim(final: Path) -> None:
    """Create `final` as an empty file. If the process is killed before it is replaced, the empty file stays."""
    try:
        os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        raise already_exists(final) from None
