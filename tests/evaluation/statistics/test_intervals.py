"""Confidence intervals of FID: how often they cover, how wide they are, and what they take as strata."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.statistics.frechet import frechet_distance
from flexvar_evaluation.statistics.intervals import (
    Interval,
    RunInfluences,
    difference_of,
    expected_fid,
    influences_of,
    limit_fid,
    quarters_of,
)
from flexvar_evaluation.statistics.moments import Moments, moments_of
from flexvar_runtime.errors import InvalidInput

FACTORS = 16
Z = 1.96


@dataclass(frozen=True)
class World:
    """A known distribution: classes with different means in a space of factors, mapped to features.

    clipped: at 0, as by a ReLU. moved: how far the weights are from those of the world with 0.
    """

    width: int
    classes: int
    clipped: bool = False
    moved: float = 0.0

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.float32]:
        """(count, width) float32. Image i has class i modulo the number of classes."""
        world = np.random.default_rng(0)
        strength = ((1 + np.arange(FACTORS)) ** -0.6)[:, None]
        weights, move = (world.standard_normal((FACTORS, self.width)) * strength for _ in range(2))
        centres = 0.9 * world.standard_normal((self.classes, FACTORS))[np.arange(count) % self.classes]
        factors = centres + (0.7 - 0.3 * self.moved) * random.standard_normal((count, FACTORS))
        features = 0.5 * factors @ (weights + 0.25 * self.moved * move)
        features += 0.3 * random.standard_normal((count, self.width))
        return (np.maximum(features, 0) if self.clipped else features).astype(np.float32)


def influences(features: NDArray[np.float32], classes: int, reference: Moments) -> RunInfluences:
    return influences_of(features, np.arange(len(features)) % classes, moments_of([features]), reference)


@dataclass(frozen=True)
class Draws:
    """Intervals of many draws."""

    intervals: list[Interval]

    @property
    def values(self) -> NDArray[np.float64]:
        return np.array([each.value for each in self.intervals])

    @property
    def width(self) -> float:
        return float(np.mean([each.high - each.low for each in self.intervals]))

    @property
    def width_ratio(self) -> float:
        """The mean width over that of 95 % of the values."""
        return self.width / (2 * Z * float(self.values.std(ddof=1)))

    def coverage(self, value: float) -> float:
        return float(np.mean([each.low <= value <= each.high for each in self.intervals]))


def similar(features: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """Features of a second run with the same classes and seeds, such as one in a lower precision."""
    return (features * 1.02 + 0.02 * random.standard_normal(features.shape)).astype(np.float32)


def measure(world: World, count: int, draws: int) -> dict[str, Draws]:
    """The intervals of two similar runs, of their difference, and of the limit, against a world that has not moved."""
    random = np.random.default_rng(1)
    reference = moments_of([replace(world, moved=0.0).draw(random, 10_000)])
    names = ("expected", "other", "difference", "limit")
    found: dict[str, list[Interval]] = {name: [] for name in names}
    for _ in range(draws):
        features = world.draw(random, count)
        run = influences(features, world.classes, reference)
        other = influences(similar(features, random), world.classes, reference)
        intervals = expected_fid(run), expected_fid(other), expected_fid(difference_of(other, run)), limit_fid(run)
        for name, interval in zip(names, intervals, strict=True):
            found[name].append(interval)
    return {name: Draws(intervals) for name, intervals in found.items()}


def check_expected(found: dict[str, Draws], low: float, high: float, widest: float) -> None:
    """Coverage of the mean over the draws, and width, of the intervals of a run and of a difference."""
    for draws in (found["expected"], found["difference"]):
        assert low <= draws.coverage(draws.values.mean()) <= high
        assert 1 / widest <= draws.width_ratio <= widest
    unpaired = np.hypot(found["expected"].width, found["other"].width)
    assert found["difference"].width < 0.7 * unpaired


def test_coverage_in_few_draws() -> None:
    """In 120 draws, 95 % have a standard deviation of 2 %."""
    check_expected(measure(World(16, 10, clipped=True, moved=0.3), 400, 120), 0.89, 1.0, 1.3)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("clipped", "classes", "moved"), [(False, 10, 0.0), (False, 100, 0.3), (True, 100, 0.3), (True, 10, 1.0)]
)
def test_coverage(clipped: bool, classes: int, moved: float) -> None:
    """In 500 draws, 95 % have a standard deviation of 1 %. Without `moved`, FID is mostly its bias."""
    world = World(64, classes, clipped, moved)
    found = measure(world, 1500, 500)
    check_expected(found, 0.92, 0.98, 1.3)
    # two million images, whose own bias in FID is a thousandth of that of a draw
    random = np.random.default_rng(1)
    reference = moments_of([replace(world, moved=0.0).draw(random, 10_000)])
    large = moments_of(world.draw(np.random.default_rng(2 + i), 50_000) for i in range(40))
    assert 0.89 <= found["limit"].coverage(frechet_distance(large, reference)) <= 0.98


def test_extrapolation_removes_two_terms_of_bias() -> None:
    def fid(images: float) -> float:
        return 3 + 500 / images + 7000 / images**2

    run = RunInfluences(fid(100), fid(50), fid(25), np.zeros(100), np.zeros(100), np.zeros(100, np.int64))
    assert limit_fid(run).value == pytest.approx(3)


def constant_by_class(classes: NDArray[np.int64]) -> RunInfluences:
    return RunInfluences(1, 2, 3, classes * 1.0, classes * 1.0, classes)


def test_differences_between_classes_do_not_widen() -> None:
    interval = expected_fid(constant_by_class(np.arange(120) % 10))
    assert interval == Interval(1, 1, 1)


def test_classes_with_one_image_count_as_one_stratum() -> None:
    classes = np.arange(120)
    interval = expected_fid(constant_by_class(classes))
    expected = Z * classes.std(ddof=1) / 120**0.5
    assert interval.high - interval.value == pytest.approx(expected, rel=0.02)  # the halves are not equal


def test_a_single_rare_class_takes_the_variance_of_all() -> None:
    classes = np.array([5] + [7] * 11)
    values = np.arange(12.0)
    run = RunInfluences(1, 1, 1, values, values, classes)
    common = values[1:].var(ddof=1)
    variance = (11 * common + values.var(ddof=1)) / 12**2
    interval = limit_fid(run)
    assert Z * variance**0.5 <= interval.high - interval.value <= Z * (2 * variance) ** 0.5 * 1.001


def test_the_variance_of_pairs_stays_in_its_limits() -> None:
    random = np.random.default_rng(0)
    values, classes = random.standard_normal(1000), np.zeros(1000, np.int64)
    plain = Z * values.std() / 1000**0.5
    for scale, expected, limit in ((0.1, 1, 1), (1, 1, 1), (10, 0.5**0.5, 2**0.5)):
        run = RunInfluences(1, 1, 1, values, scale * values, classes)
        for interval, ratio in ((expected_fid(run), expected), (limit_fid(run), limit)):
            assert (interval.high - interval.low) / 2 == pytest.approx(ratio * plain, rel=0.02)


@pytest.mark.parametrize("order", ["in turn", "sorted", "random"])
def test_each_quarter_has_its_share_of_each_class(order: str) -> None:
    classes = np.arange(404) % 10
    if order != "in turn":
        classes = np.sort(classes) if order == "sorted" else np.random.default_rng(0).permutation(classes)
    quarters = quarters_of(classes)
    assert np.bincount(quarters).tolist() == [101] * 4
    for of_class in range(10):
        assert set(np.bincount(quarters[classes == of_class], minlength=4)) <= {10, 11}


def test_equal_runs_differ_by_0() -> None:
    world, random = World(5, 4), np.random.default_rng(0)
    run = influences(world.draw(random, 100), 4, moments_of([world.draw(random, 100)]))
    assert expected_fid(difference_of(run, run)) == Interval(0, 0, 0) == limit_fid(difference_of(run, run))


def test_refused() -> None:
    features = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    moments, classes = moments_of([features]), np.arange(20) % 2
    with pytest.raises(InvalidInput, match="19"):
        influences_of(features, classes[1:], moments, moments)
    with pytest.raises(InvalidInput, match="7"):
        influences_of(features[:7], classes[:7], moments, moments)
    run = influences_of(features, classes, moments, moments)
    with pytest.raises(InvalidInput):
        difference_of(run, replace(run, classes=1 - classes))
