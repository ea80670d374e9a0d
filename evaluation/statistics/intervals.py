"""Confidence intervals of FID, and of the difference of two runs.

An interval answers: how much would FID change with other random seeds, for the same classes, the same number of images
and the same reference? It does not cover the choice of the reference's images.

FID is biased: with N images its expected value is higher than with infinitely many, by about b / N. Published figures
are expected values at 50,000 images. So there are two intervals:

- `expected_fid` covers the expected FID at this number of images. Its centre is FID itself.
- `limit_fid` covers FID with infinitely many images. Its centre is extrapolated from FID with all images (F), with
  half of them (H, a mean of two) and with a quarter (Q, a mean of four): (8 F - 6 H + Q) / 3. This removes b / N and
  the next term, c / N². Chong and Forsyth, "Effectively unbiased FID and Inception Score and where to find them", 2020,
  fit more sizes.

The variances come from the influence of each image (`frechet.Influence`). To second order, FID has the variance
V1 + V2: V1 from terms linear in the images, V2 from terms of pairs of images. The influences are computed with moments
of the same images, so the variance of their mean is V1 + 2 V2. Computed in the two halves, and for as many images, it
is V1 + 4 V2. From the two follows V1 + V2, the variance of FID. The centre of `limit_fid` has the variance V1 + 4 V2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid

from .frechet import frechet_distance, influence_on
from .moments import Moments, joined, moments_of

LEVEL = 0.95
"""The probability with which an interval covers the value."""
FEWEST = 4
"""Classes with fewer images form one stratum. Larger classes have at least two images in each half."""
ROWS = 5_000
"""Images that are read at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RunInfluences:
    """FID of a run, and the influence of each image on it.

    fid: of all images. half_fid, quarter_fid: the mean FID of the two halves and of the four quarters.
    values: (N,) float64, the influence of each image on `fid`. half_values: (N,) float64, its influence on the FID of
    its half. classes: (N,) integers.
    """

    fid: float
    half_fid: float
    quarter_fid: float
    values: NDArray[np.float64]
    half_values: NDArray[np.float64]
    classes: NDArray[np.integer]


def influences_of(
    features: NDArray[np.float32], classes: NDArray[np.integer], samples: Moments, reference: Moments
) -> RunInfluences:
    """The influences of the images of a run on its FID.

    features: (N, D) float32, may be mapped from a file. classes: (N,) integers, the class of each image.
    samples: the moments of `features`. Raises InvalidInput for fewer than 8 images, and unless each has a class.
    """
    if len(classes) != len(features) or len(features) < 8:
        found = f"the number of images is {len(features)} and that of classes {len(classes)}"
        raise invalid(found, "equal, and 8 or more", "Pass one class for each image.")
    values = influence_on(samples, reference).values(_blocks(features))
    half_values, half_fids, quarter_fids = np.empty(len(features)), list[float](), list[float]()
    part = quarters_of(classes)
    for half in (0, 1):
        quarters = [moments_of(_blocks(features, part == quarter)) for quarter in (half, half + 2)]
        moments = joined(*quarters)
        quarter_fids += [frechet_distance(quarter, reference) for quarter in quarters]
        half_fids.append(frechet_distance(moments, reference))
        chosen = part % 2 == half
        half_values[chosen] = influence_on(moments, reference).values(_blocks(features, chosen))
    fids = frechet_distance(samples, reference), float(np.mean(half_fids)), float(np.mean(quarter_fids))
    return RunInfluences(*fids, values, half_values, classes)


def difference_of(run: RunInfluences, other: RunInfluences) -> RunInfluences:
    """The FID of `run` minus that of `other`, image by image. The intervals take it as they take a run.

    Images at the same place must have the same class, and should have the same seed: what both share cancels.
    Raises InvalidInput unless the classes are equal.
    """
    if not np.array_equal(run.classes, other.classes):
        raise invalid("the classes of two runs differ", "equal, image by image", "Compare runs of the same classes.")
    return RunInfluences(
        run.fid - other.fid,
        run.half_fid - other.half_fid,
        run.quarter_fid - other.quarter_fid,
        run.values - other.values,
        run.half_values - other.half_values,
        run.classes,
    )


def expected_fid(run: RunInfluences) -> Interval:
    """FID, with a 95 % interval for its expected value at this number of images."""
    whole, half = _variances(run)
    return _interval(run.fid, whole - (half - whole) / 2)


def limit_fid(run: RunInfluences) -> Interval:
    """The estimate of FID with infinitely many images, with its 95 % interval.

    It needs 20 times as many images as there are features. With fewer the interval misses the value too often.
    """
    _, half = _variances(run)
    return _interval((8 * run.fid - 6 * run.half_fid + run.quarter_fid) / 3, half)


def quarters_of(classes: NDArray[np.integer]) -> NDArray[np.intp]:
    """The quarter of each image, (N,) from 0 to 3. The images of a class go to the quarters in turn.

    Quarters 0 and 2 are the first half, 1 and 3 the second.
    """
    quarters = np.empty(len(classes), np.intp)
    quarters[np.argsort(classes, kind="stable")] = np.arange(len(classes)) % 4
    return quarters


def _variances(run: RunInfluences) -> tuple[float, float]:
    """V1 + 2 V2 and V1 + 4 V2. V1 and V2 are not negative, so the second is once to twice the first."""
    strata = _strata(run.classes)
    whole = _variance_of_mean(run.values, strata)
    half = _variance_of_mean(run.half_values, 2 * strata + quarters_of(run.classes) % 2)
    return whole, min(max(half, whole), 2 * whole)


def _strata(classes: NDArray[np.integer]) -> NDArray[np.intp]:
    """The stratum of each image, from 0 on: its class, or 0 for all classes with fewer than 4 images together."""
    _, positions, counts = np.unique(classes, return_inverse=True, return_counts=True)
    return np.where(counts[positions] < FEWEST, 0, positions + 1)


def _variance_of_mean(values: NDArray[np.float64], strata: NDArray[np.intp]) -> float:
    """The variance of the mean of values, when the number of values of each stratum is fixed.

    This is the sum over the strata of (n_s / n)² s_s² / n_s. A stratum of one value takes the variance of all values.
    """
    counts = np.bincount(strata)
    means = np.bincount(strata, values) / np.maximum(counts, 1)
    squares = np.bincount(strata, (values - means[strata]) ** 2)
    variances = np.where(counts > 1, squares / np.maximum(counts - 1, 1), values.var(ddof=1))
    return float((counts * variances).sum()) / len(values) ** 2


def _interval(value: float, variance: float) -> Interval:
    margin = NormalDist().inv_cdf((1 + LEVEL) / 2) * variance**0.5
    return Interval(value, value - margin, value + margin)


def _blocks(features: NDArray[np.float32], chosen: NDArray[np.bool_] | None = None) -> Iterator[NDArray[np.float32]]:
    """The chosen rows, or all rows, in blocks."""
    for start in range(0, len(features), ROWS):
        block = features[start : start + ROWS]
        yield block if chosen is None else block[chosen[start : start + ROWS]]
