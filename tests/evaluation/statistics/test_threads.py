"""A figure has the same bits with every number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from flexvar_evaluation.statistics import distances, threads
from flexvar_evaluation.statistics.frechet import frechet_distance, influence_on
from flexvar_evaluation.statistics.inception_score import class_probabilities, inception_score
from flexvar_evaluation.statistics.manifold import radii
from flexvar_evaluation.statistics.moments import moments_of


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def figures() -> list[bytes]:
    """Of features wide enough for NumPy to use several threads."""
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((500, 200)).astype(np.float32) for _ in range(2))
    a, b = moments_of([x]), moments_of([y])
    score = inception_score(class_probabilities([y], x[:200]))
    numbers = np.array([frechet_distance(a, b), score])
    arrays = (a.covariance, influence_on(a, b).values([x]), radii(x, "half"), radii(x, "float32"), numbers)
    return [array.tobytes() for array in arrays]


def test_one_thread_inside_and_as_before_outside() -> None:
    with threadpool_limits(2, user_api="blas"):
        with threads.fixed_threads():
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_figures_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "TILE", 200)
    found = []
    for count in (1, 2):
        monkeypatch.setattr(threads, "default_threads", lambda count=count: count)
        with threadpool_limits(count, user_api="blas"):
            found.append(figures())
    assert found[0] == found[1]


def test_without_fixed_threads_they_would_not() -> None:
    """If this fails, NumPy's linear algebra no longer depends on its threads, and `fixed_threads` may go."""
    matrix = np.random.default_rng(0).standard_normal((200, 200))
    found = []
    for count in (1, 2):
        with threadpool_limits(count, user_api="blas"):
            found.append(np.linalg.eigh(matrix @ matrix.T)[1].tobytes())
    assert len(set(found)) > 1


def test_at_most_eight_tiles_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, tiles in ((1, 1), (5, 5), (64, 8)):
        monkeypatch.setattr(threads, "default_threads", lambda processors=processors: processors)
        assert threads.tiles_at_once() == tiles
