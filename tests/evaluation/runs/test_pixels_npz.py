"""The NPZ file for OpenAI's evaluator, read as that reads it: a zip entry that is streamed batch by batch."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.runs.pixels_npz import write_pixels_npz
from flexvar_runtime.errors import InvalidInput


def streamed(path: Path, batch: int) -> Iterator[NDArray[np.uint8]]:
    """Batches of `arr_0`. The array must be in a zip entry of that name, in C order, of plain numbers, and unpacked."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as entry:
        assert np.lib.format.read_magic(entry) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(entry)
        assert not fortran_order and not dtype.hasobject and len(shape) == 4
        left = shape[0]
        while left:
            rows = min(batch, left)
            data = entry.read(rows * int(np.prod(shape[1:])) * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])
            left -= rows
        assert entry.read(1) == b""


def pictures(count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, 6, 5, 3), np.uint8)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_evaluators_reader_reads_it(tmp_path: Path, batch: int) -> None:
    images = pictures(10)
    write_pixels_npz(tmp_path / "x.npz", (images[i : i + 3] for i in range(0, 10, 3)), images.shape)
    assert np.array_equal(np.concatenate(list(streamed(tmp_path / "x.npz", batch))), images)
    with np.load(tmp_path / "x.npz") as loaded:
        assert list(loaded) == ["arr_0"] and np.array_equal(loaded["arr_0"], images)


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    images = pictures(4)
    for name, blocks in (("a.npz", [images]), ("b.npz", [images[:1], images[1:]])):
        write_pixels_npz(tmp_path / name, blocks, images.shape)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("count", [3, 5])
def test_other_numbers_of_images_leave_no_file(tmp_path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} images were given, not 4"):
        write_pixels_npz(tmp_path / "x.npz", [pictures(count)], (4, 6, 5, 3))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"mine")
    with pytest.raises(InvalidInput, match="exists already"):
        write_pixels_npz(path, [pictures(1)], (1, 6, 5, 3))
    assert path.read_bytes() == b"mine"
    write_pixels_npz(path, [pictures(1)], (1, 6, 5, 3), force=True)
    assert path.read_bytes() != b"mine"
