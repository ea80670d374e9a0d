"""A reader of `.npz` files from outside. Names, types and shapes are known before an array is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..checks import short
from .parsing import refuse_failures

_MOST_ENTRIES = 10_000
_LARGEST_HEADER = 1024  # bytes that describe an array. NumPy writes about 128
_SUFFIX = ".npy"
_KINDS = frozenset("biuf")  # NumPy's codes of bool, signed and unsigned integers, and floats


@dataclass(frozen=True)
class ArrayInfo:
    """Type and shape of a stored array."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class NpzFile:
    """The arrays of an open `.npz` file. infos: their types and shapes by name.

    packed: whether compressed arrays are allowed. An array may then need far more memory than its file has bytes.
    """

    def __init__(self, archive: ZipFile, *, packed: bool = False) -> None:
        self._archive, self._packed = archive, packed
        entries = archive.infolist()
        if len(entries) > _MOST_ENTRIES or len({entry.filename for entry in entries}) != len(entries):
            raise ValueError("it has too many entries, or one of them twice")
        self._entries = {entry.filename.removesuffix(_SUFFIX): entry for entry in entries}
        self.infos = {name: self._info(entry) for name, entry in self._entries.items()}

    def _info(self, entry: ZipInfo) -> ArrayInfo:
        stored = entry.compress_type == ZIP_STORED and entry.compress_size == entry.file_size
        allowed = stored or (self._packed and entry.compress_type == ZIP_DEFLATED)
        if not allowed or entry.flag_bits & 1 or not entry.filename.endswith(_SUFFIX):
            raise ValueError(f"its entry {entry.filename[:100]!r} is not a stored array")
        with self._archive.open(entry) as file:
            shape, dtype = _read_header(file)
            if entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the size of {entry.filename[:100]!r} does not fit its shape")
        return ArrayInfo(str(dtype), shape)

    def read(self, name: str) -> NDArray[Any]:
        """One array. Raises KeyError, ValueError."""
        with self._archive.open(self._entries[name]) as file:
            shape, dtype = _read_header(file)
            return np.frombuffer(bytearray(file.read()), dtype).reshape(shape)

    def blocks(self, name: str, rows: int) -> Iterator[NDArray[Any]]:
        """One array, in blocks of at most `rows` rows, each of which is read when it is asked for.

        Raises KeyError, ValueError.
        """
        with self._archive.open(self._entries[name]) as file:
            (count, *row), dtype = _read_header(file)
            row_bytes = math.prod(row) * dtype.itemsize
            for start in range(0, count, rows):
                some = min(rows, count - start)
                data = file.read(some * row_bytes)
                if len(data) != some * row_bytes:
                    raise ValueError(f"{name} ends too early")
                yield np.frombuffer(bytearray(data), dtype).reshape(some, *row)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in a `.npy` file of version 1.0, in the order of C and this machine's bytes."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("it has an array of another version than 1.0")
    shape, fortran, dtype = npy.read_array_header_1_0(file, max_header_size=_LARGEST_HEADER)
    plain = dtype.kind in _KINDS and dtype.isnative and not fortran
    if not plain or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError("it has an array that is not made of plain numbers")
    return shape, dtype


@contextmanager
def open_npz(source: Path | BinaryIO, name: str, *, expected: str, fix: str, packed: bool = False) -> Iterator[NpzFile]:
    """Open an `.npz` file with arrays of plain numbers. Arrays are read on demand.

    name: of the file, for errors. packed: whether arrays may be compressed. Every exception in the body becomes an
    ArtifactRefused with `expected` and `fix`. MemoryError becomes OutOfMemory.
    """
    with refuse_failures(f"{name} cannot be read", expected=expected, fix=fix), ZipFile(source) as archive:
        yield NpzFile(archive, packed=packed)


def read_npz(
    source: Path | BinaryIO, name: str, arrays: Mapping[str, ArrayInfo], *, fix: str
) -> dict[str, NDArray[Any]]:
    """Read an `.npz` file that must hold exactly these arrays. Raises ArtifactRefused, OutOfMemory."""
    expected = ", ".join(f"{key} {info}" for key, info in arrays.items())
    with open_npz(source, name, expected=expected, fix=fix) as stored:
        for key in sorted(stored.infos.keys() | arrays.keys()):
            found, wanted = stored.infos.get(key), arrays.get(key)
            if found != wanted:
                raise ValueError(
                    f"its array {short(key)} is {found or 'missing'}, but it must be {wanted or 'left out'}"
                )
        return {key: stored.read(key) for key in arrays}
