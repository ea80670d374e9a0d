"""The mean and the covariance of features. FID compares them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .blocks import regroup
from .threads import fixed_threads

ROWS = 1_000
"""Rows that are added at a time: 16 MB at 2,048 features."""


@dataclass(frozen=True)
class Moments:
    """mean: (D,) float64. covariance: (D, D) float64, unbiased as in np.cov. count: of the images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int


@fixed_threads()
def moments_of(blocks: Iterable[NDArray[np.float32]]) -> Moments:
    """The moments of all rows of all blocks. Only one block is held at a time.

    blocks: (any, D) float32, the features of the images. How they are cut does not change the result.
    Raises InvalidInput for fewer than two images and for features that are not finite.
    """
    sums = _Sums(0, np.zeros(0), np.zeros((0, 0)))
    for block in regroup(blocks, ROWS):
        rows = block.astype(np.float64)
        mean = rows.mean(0)
        if not np.isfinite(mean).all():
            raise invalid("a feature is infinite or not a number", "finite", "Compute the features again.")
        rows -= mean
        sums = _merged(sums, _Sums(len(rows), mean, rows.T @ rows))
    if sums.count < 2:
        raise invalid(f"the number of images is {sums.count}", "2 or more", "A covariance needs two images.")
    return Moments(sums.mean, sums.scatter / (sums.count - 1), sums.count)


def joined(a: Moments, b: Moments) -> Moments:
    """The moments of all images of two sets, from the moments of each."""
    first, second = (_Sums(m.count, m.mean, m.covariance * (m.count - 1)) for m in (a, b))
    sums = _merged(first, second)
    return Moments(sums.mean, sums.scatter / (sums.count - 1), sums.count)


@dataclass(frozen=True)
class _Sums:
    """scatter: (D, D) float64, the sum over the images of (x - mean) (x - mean)^T."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]


def _merged(a: _Sums, b: _Sums) -> _Sums:
    """The sums over two sets of images.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if not a.count:
        return b
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = np.outer(shift, shift * (a.count * b.count / count))
    scatter += a.scatter
    scatter += b.scatter
    return _Sums(count, a.mean + shift * (b.count / count), scatter)
