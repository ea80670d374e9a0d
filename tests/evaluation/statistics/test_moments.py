"""Means and covariances, and the blocks that they are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_evaluation.statistics import moments as module
from flexvar_evaluation.statistics.blocks import regroup
from flexvar_evaluation.statistics.moments import joined, moments_of
from flexvar_runtime.errors import InvalidInput


@pytest.fixture
def features() -> NDArray[np.float32]:
    """2,500 rows: more than two blocks of 1,000."""
    return np.random.default_rng(0).standard_normal((2500, 7)).astype(np.float32) * 3 + 5


def cut(features: NDArray[np.float32], at: Sequence[int]) -> list[NDArray[np.float32]]:
    return np.split(features, at)


def test_as_numpy(features: NDArray[np.float32]) -> None:
    moments = moments_of([features])
    assert moments.count == 2500
    np.testing.assert_allclose(moments.mean, features.astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("at", [range(1, 2500, 77), [999], [1000, 1000, 2001], [2499]])
def test_blocks_of_the_caller_do_not_matter(features: NDArray[np.float32], at: Sequence[int]) -> None:
    whole, blocks = moments_of([features]), moments_of(iter(cut(features, at)))
    assert np.array_equal(whole.mean, blocks.mean) and np.array_equal(whole.covariance, blocks.covariance)


def test_sorted_features_far_from_zero() -> None:
    """Squares minus the square of the mean would lose all digits here: 1e10 against 1."""
    far = (1e5 + np.sort(np.random.default_rng(0).standard_normal((3000, 2)), axis=0)).astype(np.float32)
    np.testing.assert_allclose(moments_of([far]).covariance, np.cov(far.astype(np.float64), rowvar=False), rtol=1e-9)


def test_joined_moments_are_those_of_all(features: NDArray[np.float32]) -> None:
    both, whole = joined(moments_of([features[:300]]), moments_of([features[300:]])), moments_of([features])
    assert both.count == 2500
    np.testing.assert_allclose(both.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(both.covariance, whole.covariance, rtol=1e-12)


def test_one_block_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 10)
    taken = list[int]()

    def blocks() -> object:
        for i in range(100):
            taken.append(i)
            yield np.ones((5, 2), np.float32)

    groups = regroup(blocks(), 10)  # type: ignore[arg-type]
    assert next(groups).shape == (10, 2) and taken == [0, 1]


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [np.ones((1, 3), np.float32)],
        [np.ones((2, 3))],
        [np.ones(3, np.float32)],
        [np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)],
        [np.array([[1, np.inf], [2, 3]], np.float32)],
        [np.array([[1, np.nan], [2, 3]], np.float32)],
    ],
    ids=["none", "one", "float64", "flat", "two widths", "infinite", "not a number"],
)
def test_refused(blocks: list[NDArray[np.float32]]) -> None:
    with pytest.raises(InvalidInput):
        moments_of(blocks)
