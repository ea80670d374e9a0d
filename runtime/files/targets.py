"""Checks of the places where results will be written, before the work that makes them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checks import invalid
from ..errors import EnvironmentFailed, InvalidInput
from .atomic import already_exists, require_regular
from .temporary import sibling

_BLOCK = bytes(4096)
_DESCRIPTORS = "/proc/self/fd"


def place_of(path: Path) -> Path:
    """The real folder of a path, with its name. A link of that name is not followed: it would be replaced."""
    return Path(os.path.realpath(path.parent), path.name)


def check_files(paths: Sequence[Path], force: bool) -> None:
    """Raise InvalidInput if a result cannot be written to one of the paths.

    Refused are paths of directories, names that are too long, and paths that are given twice. Without `force`, paths of
    existing files are refused too.
    """
    places = [place_of(path) for path in paths]
    folders = {folder for place in places for folder in place.parents}
    seen: set[Path] = set()
    for path, place in zip(paths, places, strict=True):
        if place in seen:
            raise invalid(f"{path} is the name of two results", "a name of its own", "Choose another name.")
        seen.add(place)
        if place in folders or os.path.isdir(path):
            raise invalid(f"{path} is a directory", "a file", "Choose another name.")
        require_regular(path)
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            got, fix = f"{path} cannot be written: {error.strerror}.", "Choose another name."
            raise InvalidInput(got, expected="a name that the file system takes", fix=fix) from error
        if not force:
            raise already_exists(path)


def require_utf8(path: Path, library: str) -> None:
    """Raise EnvironmentFailed if a path is not UTF-8, because `library` opens no other files."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        got, fix = (
            f"{library} cannot open {path}, because its name is not UTF-8.",
            "Rename its directories, or move it.",
        )
        raise EnvironmentFailed(got, expected="a path in UTF-8", fix=fix) from error


@contextmanager
def utf8_name(path: Path, library: str) -> Iterator[str]:
    """A name in UTF-8 by which `library` can open a file in the body. Raises EnvironmentFailed where there is none.

    A folder whose name is not UTF-8 has another name as long as it is open: that of its descriptor, on Linux.
    """
    try:
        require_utf8(path, library)
    except EnvironmentFailed:
        if not os.path.isdir(_DESCRIPTORS):
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            inner = Path(_DESCRIPTORS, str(folder), path.name)
            require_utf8(inner, library)
            yield str(inner)
        finally:
            os.close(folder)
    else:
        yield str(path)


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, and write in it once. Raises InvalidInput and EnvironmentFailed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        taken = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file has that name" if taken else error.strerror
        got, fix = f"The directory {folder} cannot be made: {reason}.", "Choose another directory."
        raise InvalidInput(got, expected="a directory that can be made", fix=fix) from error
    require_writable(folder)


def require_writable(folder: Path) -> None:
    """Write a small file in an existing folder and remove it. Raises InvalidInput and EnvironmentFailed."""
    if not os.path.isdir(folder):
        taken = next((part for part in (folder, *folder.parents) if os.path.isfile(part)), None)
        got = f"There is no directory {folder}." if taken is None else f"{taken} is a file, not a directory."
        fix = f"Run: {shlex.join(['mkdir', '-p', str(folder)])}" if taken is None else "Choose another directory."
        raise InvalidInput(got, expected="an existing directory", fix=fix)
    probe = sibling(folder / "probe", "partial")
    try:
        with probe.open("xb") as file:
            file.write(_BLOCK)
    except OSError as error:
        raise EnvironmentFailed(
            f"No file can be written in {folder} ({error.strerror or error}).",
            expected="a directory that can be written",
            fix="Correct its permissions, free space, or choose another directory.",
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()
