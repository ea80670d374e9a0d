"""Pictures to score: an `.npz` file, a folder of picture files, or a run that keeps pixels. Read block by block."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files.npz import open_npz
from flexvar_runtime.pictures.photo import read_photo

from .runs.settings import FILE as RUN_FILE
from .runs.settings import read_settings

Pixels = NDArray[np.uint8]
_ARRAY = "arr_0"
_FORMATS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
_NUMBER = re.compile(r"(?:.*[^0-9])?([0-9]{1,9})[^0-9]*")
_FIX = "Pass an .npz file whose array arr_0 holds the pictures (N, H, W, 3) uint8, or a directory of picture files."


class Pictures(Protocol):
    """Pictures of one size, in order."""

    @property
    def count(self) -> int:
        """Number of pictures."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of each."""

    @property
    def identity(self) -> str:
        """A hash of what they are."""

    def blocks(self, start: int, rows: int) -> Iterator[Pixels]:
        """The pictures from number `start` on, in blocks (n, H, W, 3) of at most `rows`. Raises ArtifactRefused."""


def open_pictures(path: Path, *, partial: bool = False) -> Pictures:
    """The pictures in an `.npz` file or a folder.

    partial: whether numbers may be missing among files that are numbered. Raises InvalidInput, ArtifactRefused.
    """
    if path.is_dir():
        return _of_folder(path, partial)
    if not path.is_file():
        raise InvalidInput(f"There is no file or directory {path}.", expected="pictures", fix=_FIX)
    return _of_npz(path)


@dataclass(frozen=True)
class NpzPictures:
    """The array `arr_0` of an `.npz` file."""

    path: Path
    count: int
    size: tuple[int, int]
    identity: str

    def blocks(self, start: int, rows: int) -> Iterator[Pixels]:
        with open_npz(self.path, str(self.path), expected="pictures", fix=_FIX, packed=True) as stored:
            passed = 0
            for block in stored.blocks(_ARRAY, rows):
                if passed + len(block) > start:
                    yield block[max(0, start - passed) :]
                passed += len(block)


def _of_npz(path: Path) -> NpzPictures:
    with open_npz(path, str(path), expected="pictures", fix=_FIX, packed=True) as stored:
        info = stored.infos.get(_ARRAY)
    if info is None or info.dtype != "uint8" or len(info.shape) != 4 or info.shape[3] != 3 or 0 in info.shape:
        got = f"{path} has the array {_ARRAY} as {info}." if info is not None else f"{path} has no array {_ARRAY}."
        raise ArtifactRefused(got, expected="pictures (N, H, W, 3) uint8", fix=_FIX)
    return NpzPictures(path, info.shape[0], (info.shape[1], info.shape[2]), file_sha256(path))


def file_sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FolderPictures:
    """Picture files in the order of their numbers, or of their names if these are no numbers. All have one size."""

    files: tuple[Path, ...]
    size: tuple[int, int]
    identity: str

    @property
    def count(self) -> int:
        return len(self.files)

    def blocks(self, start: int, rows: int) -> Iterator[Pixels]:
        for first in range(start, self.count, rows):
            yield np.stack([self._read(file) for file in self.files[first : first + rows]])

    def _read(self, file: Path) -> Pixels:
        pixels = read_photo(file).pixels
        if pixels.shape[:2] != self.size:
            (height, width), (h, w) = self.size, pixels.shape[:2]
            got = f"{file} has {h}x{w} pixels, but {self.files[0].name} has {height}x{width}."
            raise ArtifactRefused(got, expected="pictures of one size", fix="Convert the pictures to one size.")
        return pixels


def _of_folder(folder: Path, partial: bool) -> FolderPictures:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _FORMATS and path.is_file())
    numbers = [_number(file) for file in files]
    numbered = None not in numbers and len(set(numbers)) == len(files)
    if numbered:
        files.sort(key=lambda file: _number(file) or 0)
    if not files:
        names = ", ".join(sorted(_FORMATS))
        raise InvalidInput(
            f"{folder} has no picture files ({names}). Directories in it are not searched.",
            expected="pictures",
            fix=_FIX,
        )
    if numbered and not partial:
        _require_all(folder, files)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode("utf-8", "surrogateescape"))
    return FolderPictures(tuple(files), read_photo(files[0]).size, digest.hexdigest())


def _number(file: Path) -> int | None:
    """The number in the name of a file, None if there is none."""
    match = _NUMBER.fullmatch(file.stem)
    return None if match is None else int(match[1])


def _require_all(folder: Path, files: Sequence[Path]) -> None:
    """Raise InvalidInput if a number is missing among numbered files, or a picture of the run that made the folder."""
    numbers = {_number(file) or 0 for file in files}
    first, last = min(numbers), max(numbers)
    if (folder.parent / RUN_FILE).is_file():
        first, last = 0, read_settings(folder.parent).count - 1
    elif last - first >= 2 * len(files) and not all(file.stem.isdecimal() for file in files):
        return  # numbers with large gaps behind other text are names of another kind
    missing = (number for number in range(first, last + 1) if number not in numbers)
    some = list(islice(missing, 6))
    if some:
        names = ", ".join(map(str, some[:5])) + (" and more" if len(some) > 5 else "")
        raise InvalidInput(
            f"{folder} has {len(files):,} pictures numbered from {first} to {last}, but {names} "
            f"{'is' if len(some) == 1 else 'are'} missing.",
            expected="all pictures",
            fix="Add the missing pictures, or pass --partial.",
        )
