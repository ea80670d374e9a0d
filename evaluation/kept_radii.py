"""Radii of the images for precision and recall, kept while they are computed, so that a stopped score continues."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import FlexVARError
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.npz import ArrayInfo, read_npz

from .statistics.distances import Rounding
from .statistics.manifold import NEIGHBOUR, add_stripe, radii, radii_of, start_nearest, stripes

_FIX = "Delete it."


def kept_radii(work: Path | None, features: NDArray[np.float32], rounding: Rounding) -> NDArray[np.float32]:
    """The radius of every image, (N,) float32, squared distances. See `manifold.radii`.

    work: a folder in which the state is kept after every 10,000 images. Its file is named by a hash of the features.
    None keeps nothing.
    """
    if work is None:
        return radii(features, rounding)
    digest = hashlib.sha256(np.ascontiguousarray(features).data).hexdigest()
    path = work / f"radii-{digest[:16]}-{rounding}.npz"
    done, nearest = _read(path, len(features))
    for stripe in range(done, stripes(len(features))):
        nearest = add_stripe(nearest, features, stripe, rounding)
        with atomic_write(path, force=True) as partial, partial.open("wb") as file:
            np.savez(file, stripes=np.array([stripe + 1]), nearest=nearest)
    return radii_of(nearest)


def _read(path: Path, count: int) -> tuple[int, NDArray[np.float32]]:
    """How many stripes are done, and the state after them. A file that cannot be used is ignored."""
    wanted = {"stripes": ArrayInfo("int64", (1,)), "nearest": ArrayInfo("float32", (count, NEIGHBOUR + 1))}
    if path.is_file():
        try:
            stored = read_npz(path, str(path), wanted, fix=_FIX)
        except FlexVARError:
            return 0, start_nearest(count)
        return int(stored["stripes"][0]), stored["nearest"]
    return 0, start_nearest(count)
