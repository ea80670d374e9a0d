"""An `.npz` file with all images of a run as `arr_0`, as OpenAI's evaluator reads it. It is written as a stream."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from flexvar_runtime.files.atomic import atomic_write


def write_pixels_npz(
    path: Path, blocks: Iterable[NDArray[np.uint8]], shape: tuple[int, int, int, int], *, force: bool = False
) -> None:
    """Write blocks (n, H, W, 3) uint8, together of `shape`, as the array `arr_0`. Holds one block in memory.

    Raises InvalidInput if the file exists, unless `force`, and ValueError if the blocks have another shape together.
    """
    with atomic_write(path, force=force) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("arr_0.npy")  # dated 1980, so that the same images give the same bytes
        with archive.open(entry, "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            rows = 0
            for block in blocks:
                if block.dtype != np.uint8 or block.shape[1:] != shape[1:]:
                    raise ValueError(f"a block has shape {block.shape} and dtype {block.dtype}, not {shape[1:]} uint8")
                file.write(np.ascontiguousarray(block).data)
                rows += len(block)
        if rows != shape[0]:
            raise ValueError(f"{rows} images were given, not {shape[0]}")
