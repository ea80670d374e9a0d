"""Laws of the Fréchet distance, and the influence of an image on it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.statistics.frechet import frechet_distance, influence_on
from flexvar_evaluation.statistics.moments import Moments, moments_of
from flexvar_runtime.errors import InvalidInput

WIDTH = 12


def draw(seed: int, count: int = 400, width: int = WIDTH) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, width)) @ random.standard_normal((width, width)) + seed).astype(np.float32)


@pytest.fixture
def pair() -> tuple[Moments, Moments]:
    return moments_of([draw(1)]), moments_of([draw(2)])


def test_equal_moments_have_distance_0(pair: tuple[Moments, Moments]) -> None:
    assert frechet_distance(pair[0], pair[0]) == pytest.approx(0, abs=1e-10 * np.trace(pair[0].covariance))


def test_symmetric(pair: tuple[Moments, Moments]) -> None:
    a, b = pair
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-11)


def test_rotations_and_translations_change_nothing(pair: tuple[Moments, Moments]) -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((WIDTH, WIDTH)))
    turned = [Moments(turn @ m.mean + 7, turn @ m.covariance @ turn.T, m.count) for m in pair]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(*pair), rel=1e-11)


def test_diagonal_covariances_have_a_closed_form() -> None:
    random = np.random.default_rng(0)
    means, deviations = random.standard_normal((2, WIDTH)), random.uniform(0, 2, (2, WIDTH))
    deviations[0, :3] = deviations[1, 2:5] = 0  # singular, one of them, the other, and both
    moments = [Moments(m, np.diag(d**2), 100) for m, d in zip(means, deviations, strict=True)]
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-12)


def test_fewer_images_than_features() -> None:
    """Two covariances of rank 4 and 5 in different spaces. The singular values of the roots give the exact value."""
    rows = [draw(seed, count, 40).astype(np.float64) for seed, count in ((1, 5), (2, 6))]
    roots = [((r - r.mean(0)) / np.sqrt(len(r) - 1)).T for r in rows]
    expected = sum((root**2).sum() for root in roots) - 2 * np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    expected += ((rows[0].mean(0) - rows[1].mean(0)) ** 2).sum()
    moments = [moments_of([r.astype(np.float32)]) for r in rows]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-5)  # as inexact as the evaluator


def test_no_variance_at_all() -> None:
    points = [Moments(np.full(3, value), np.zeros((3, 3)), 2) for value in (0.0, 2.0)]
    assert frechet_distance(*points) == 12
    assert np.array_equal(influence_on(*points).curvature, np.eye(3))


def test_influence_is_the_derivative(pair: tuple[Moments, Moments]) -> None:
    """Give one image the weight e and take the slope of FID at e = 0."""
    samples, reference = pair
    x = draw(1, 401)[400:]
    [influence] = influence_on(samples, reference).values([x])
    shift = x[0] - samples.mean

    def fid(weight: float) -> float:
        covariance = (1 - weight) * (samples.covariance + weight * np.outer(shift, shift))
        return frechet_distance(Moments(samples.mean + weight * shift, covariance, 400), reference)

    step = 1e-5
    assert influence == pytest.approx((fid(step) - fid(-step)) / (2 * step), rel=1e-5)


def test_influences_have_mean_0() -> None:
    """Exactly 0 with the covariance that divides by n. Here it divides by n - 1."""
    rows = draw(1)
    influence = influence_on(moments_of([rows]), moments_of([draw(2)]))
    assert influence.values([rows]).mean() == pytest.approx(-influence.offset / 400, rel=1e-6)


def test_influences_do_not_depend_on_blocks() -> None:
    rows = draw(1, 2300)
    influence = influence_on(moments_of([rows]), moments_of([draw(2)]))
    assert np.array_equal(influence.values([rows]), influence.values(np.split(rows, range(1, 2300, 371))))
    assert influence.values([]).shape == (0,)


def test_other_widths_are_refused(pair: tuple[Moments, Moments]) -> None:
    other = moments_of([draw(1, width=5)])
    with pytest.raises(InvalidInput, match="5"):
        frechet_distance(pair[0], other)
    with pytest.raises(InvalidInput, match="5"):
        influence_on(other, pair[0])
