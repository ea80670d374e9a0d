"""Squared distances between features, tile by tile, rounded as in OpenAI's evaluator.

The evaluator computes max(|u|² - 2uv + |v|², 0) for blocks of 10,000 x 10,000 images in half precision. If a distance
of a block overflows, it computes that block again in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .threads import fixed_threads, tiles_at_once

Rounding = Literal["half", "float32"]
"""half: as the evaluator. Features, norms, products and sums are rounded to float16. float32: nothing is rounded."""

BLOCK = 10_000
"""Images along a side of a block. This decides what falls back to float32, so it is the evaluator's."""
TILE = 500
"""Rows of a block that are computed at a time: 20 MB for one array of distances."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Tile:
    """Distances from some images u of a first set, given by `rows`, to all images v of a second set.

    products: (m, n) float32, 2uv. first_norms: (m, 1), |u|². second_norms: (1, n), |v|².
    """

    rows: slice
    products: NDArray[np.float32]
    first_norms: NDArray[np.float32]
    second_norms: NDArray[np.float32]
    rounding: Rounding

    def forward(self) -> NDArray[np.float32]:
        """The squared distances from u to v, (m, n) float32: |u|² - 2uv + |v|². Raises OverflowError."""
        return self._distances(self.first_norms, self.second_norms)

    def backward(self) -> NDArray[np.float32]:
        """The squared distances from v to u, (m, n) float32: |v|² - 2uv + |u|². Raises OverflowError.

        In half precision they differ from the others by rounding.
        """
        return self._distances(self.second_norms, self.first_norms)

    def _distances(self, start: NDArray[np.float32], end: NDArray[np.float32]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            distances = _rounded(start - self.products, self.rounding)
            distances += end
            distances = _rounded(distances, self.rounding)
        if not np.isfinite(distances).all():
            raise OverflowError
        return np.maximum(distances, 0.0, out=distances)


def blocks_of(count: int) -> list[slice]:
    """The blocks of `count` images, in order."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def each_tile(
    first: NDArray[np.float32], second: NDArray[np.float32], rounding: Rounding, work: Callable[[Tile], Result]
) -> list[Result]:
    """work(tile) for every tile of a block, in order. Several tiles are computed at the same time.

    If a distance overflows in half precision, all tiles are computed again in float32.
    first, second: (up to 10,000, D) float32. Raises InvalidInput if a distance overflows in float32.
    """
    try:
        return _each_tile(first, second, rounding, work)
    except OverflowError:
        if rounding == "float32":
            found = "a distance between features is infinite or not a number"
            raise invalid(found, "finite", "Compute the features again.") from None
    return each_tile(first, second, "float32", work)


def _each_tile(
    first: NDArray[np.float32], second: NDArray[np.float32], rounding: Rounding, work: Callable[[Tile], Result]
) -> list[Result]:
    second = _rounded(second, rounding)
    second_norms = _norms(second, rounding)[None]

    def work_from(start: int) -> Result:
        rows = slice(start, min(start + TILE, len(first)))
        part = _rounded(first[rows], rounding)
        with np.errstate(over="ignore", invalid="ignore"):
            products = part @ second.T
            products *= 2.0
        return work(Tile(rows, _rounded(products, rounding), _norms(part, rounding)[:, None], second_norms, rounding))

    with fixed_threads(), ThreadPoolExecutor(tiles_at_once()) as pool:
        return list(pool.map(work_from, range(0, len(first), TILE)))


def _norms(features: NDArray[np.float32], rounding: Rounding) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        squares = _rounded(features * features, rounding)
        return _rounded(squares.sum(1), rounding)


def _rounded(values: NDArray[np.float32], rounding: Rounding) -> NDArray[np.float32]:
    """The values that half precision has for these, as float32. With float32 the values themselves."""
    if rounding == "float32":
        return values
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16).astype(np.float32)
