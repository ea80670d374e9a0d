"""Precision and recall: laws, resuming, and half precision, against distances computed at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.statistics import distances, manifold
from flexvar_evaluation.statistics.distances import Rounding
from flexvar_evaluation.statistics.manifold import inside, precision_recall, radii
from flexvar_runtime.errors import InvalidInput

Features = NDArray[np.float32]
BLOCK, TILE = 40, 15


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small sets have several blocks, and the blocks several tiles."""
    monkeypatch.setattr(distances, "BLOCK", BLOCK)
    monkeypatch.setattr(distances, "TILE", TILE)


def draw(seed: int, count: int = 110, scale: float = 1.0, width: int = 30) -> Features:
    return np.abs(np.random.default_rng(seed).standard_normal((count, width)) * scale).astype(np.float32)


def all_distances(u: Features, v: Features, rounding: Rounding) -> NDArray[np.float32]:
    """Squared distances at once. In half precision every step is rounded by NumPy's own float16."""
    kind: Any = np.float16 if rounding == "half" else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        a, b = u.astype(kind), v.astype(kind)
        norms = [(x * x).astype(np.float32).sum(1).astype(kind) for x in (a, b)]
        products = (2 * (a.astype(np.float32) @ b.astype(np.float32).T)).astype(kind)
        return np.maximum(norms[0][:, None] - products + norms[1], kind(0)).astype(np.float32)


def expected(reference: Features, samples: Features, rounding: Rounding) -> tuple[float, float]:
    own, other = (np.sort(all_distances(x, x, rounding))[:, 3] for x in (reference, samples))
    between = all_distances(reference, samples, rounding)
    return float((between <= own[:, None]).any(0).mean()), float((between <= other).any(1).mean())


def measured(reference: Features, samples: Features, rounding: Rounding) -> tuple[float, float]:
    return precision_recall(reference, radii(reference, rounding), samples, radii(samples, rounding), rounding)


@pytest.mark.parametrize("rounding", ["half", "float32"])
@pytest.mark.parametrize("counts", [(110, 95), (40, 80), (7, 41), (4, 4)])
def test_as_computed_at_once(rounding: Rounding, counts: tuple[int, int]) -> None:
    reference, samples = draw(1, counts[0]), draw(2, counts[1], 0.9)
    assert measured(reference, samples, rounding) == expected(reference, samples, rounding)


@pytest.mark.parametrize("rounding", ["half", "float32"])
def test_radii_are_the_distance_to_the_third_other_image(rounding: Rounding) -> None:
    """A block and its mirror differ in half precision: |u|² - 2uv is rounded before |v|² is added."""
    features = draw(1)
    at_once = np.sort(all_distances(features, features, rounding))[:, 3]
    np.testing.assert_allclose(radii(features, rounding), at_once, rtol=0 if rounding == "half" else 1e-5)


def test_identical_sets_have_precision_and_recall_1() -> None:
    features = draw(1)
    assert measured(features, features.copy(), "half") == (1, 1) == measured(features, features.copy(), "float32")


def test_sets_far_apart_have_0() -> None:
    assert measured(draw(1), draw(2) + 20, "half") == (0, 0) == measured(draw(1), draw(2) + 20, "float32")


def test_a_point_inside_all_images_is_precise_without_recall() -> None:
    reference = draw(1)
    samples = reference[:1] + np.linspace(0, 1e-3, 20, dtype=np.float32)[:, None]
    precision, recall = measured(reference, samples, "float32")
    assert precision == 1 and recall <= 1 / len(reference)


@pytest.mark.parametrize("rounding", ["half", "float32"])
def test_stripes_in_any_order(rounding: Rounding) -> None:
    features = draw(1)
    nearest = manifold.start_nearest(len(features))
    assert manifold.stripes(len(features)) == 3
    for stripe in (2, 0, 1):
        before = nearest.copy()
        after = manifold.add_stripe(nearest, features, stripe, rounding)
        assert np.array_equal(nearest, before)
        nearest = after
    assert np.array_equal(manifold.radii_of(nearest), radii(features, rounding))


@pytest.mark.parametrize("rounding", ["half", "float32"])
def test_blocks_of_samples_one_by_one(rounding: Rounding) -> None:
    reference, samples = draw(1), draw(2, 95, 0.9)
    sets = radii(reference, rounding), radii(samples, rounding)
    both = inside(reference, sets[0], samples, sets[1], rounding)
    parts = [slice(start, start + BLOCK) for start in range(0, len(samples), BLOCK)]
    found = [inside(reference, sets[0], samples[part], sets[1][part], rounding) for part in parts]
    assert np.array_equal(np.any([first for first, _ in found], axis=0), both[0])
    assert np.array_equal(np.concatenate([second for _, second in found]), both[1])


@pytest.mark.parametrize("scale", [60.0, 3e4, 1e6], ids=["norms", "products", "features"])
def test_overflow_in_half_precision_falls_back_to_float32(scale: float) -> None:
    """At a scale of 1 the roundings differ. The largest half-precision number is 65,504."""
    assert not np.array_equal(radii(draw(1), "half"), radii(draw(1), "float32"))
    assert np.array_equal(radii(draw(1, scale=scale), "half"), radii(draw(1, scale=scale), "float32"))


def test_only_the_block_that_overflows_falls_back() -> None:
    """One image of the first block is far from all others."""
    features = draw(1)
    features[3] *= 100
    half, single = radii(features, "half"), radii(features, "float32")
    own = np.sort(all_distances(features[BLOCK:], features[BLOCK:], "half"))[:, 3]
    assert np.array_equal(half[:3], single[:3])  # these are compared with every block in float32
    assert not np.array_equal(half[BLOCK:], single[BLOCK:])
    assert (half[BLOCK:] <= own).all()


@pytest.mark.parametrize("rounding", ["half", "float32"])
def test_features_that_are_not_finite_are_refused(rounding: Rounding) -> None:
    features = draw(1)
    features[50, 2] = np.nan
    with pytest.raises(InvalidInput):
        radii(features, rounding)


def test_three_images_have_no_third_neighbour() -> None:
    with pytest.raises(InvalidInput, match="3"):
        radii(draw(1, 3), "half")
