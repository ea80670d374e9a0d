"""Tokens must agree where rounding cannot explain that they do not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_bench.gpu.token_agreement import Agreement, agreement, compare_tokens
from flexvar_runtime.model.noise import draws
from flexvar_runtime.model.sampling import sample

ROWS, VOCABULARY, TOP_K, TOP_P = 400, 64, 50, 0.95


@pytest.fixture
def logits() -> NDArray[np.float32]:
    return (3 * np.random.default_rng(0).standard_normal((ROWS, VOCABULARY))).astype(np.float32)


def compared(reference: NDArray[np.float32], got: NDArray[np.float32], other_draws: bool = False) -> Agreement:
    noise = draws(1, 0, 0, ROWS)
    own = draws(2, 0, 0, ROWS) if other_draws else noise
    tokens = [sample(x, n, top_k=TOP_K, top_p=TOP_P) for x, n in ((reference, noise), (got, own))]
    return compare_tokens(reference, got, tokens[0], tokens[1], noise, top_k=TOP_K, top_p=TOP_P)


def test_equal_logits_decide_every_token(logits: NDArray[np.float32]) -> None:
    found = compared(logits, logits)
    assert found == Agreement(ROWS, ROWS, ROWS, 0, 0.0, 0.0)
    assert found.holds


def test_rounding_changes_only_tokens_that_it_explains(logits: NDArray[np.float32]) -> None:
    noisy = logits + np.float32(0.02) * np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    found = compared(logits, noisy)
    assert found.broken == 0 and found.holds
    assert found.equal < ROWS, "some draws lie at an edge"
    assert 0.8 * ROWS < found.decided < ROWS
    assert 0 < found.median_error < found.largest_error < 0.1


def test_a_sampler_with_other_draws_fails(logits: NDArray[np.float32]) -> None:
    found = compared(logits, logits, other_draws=True)
    assert found.broken > ROWS / 4 and not found.holds


def test_logits_that_have_nothing_in_common_decide_nothing(logits: NDArray[np.float32]) -> None:
    found = compared(logits, np.random.default_rng(9).permutation(logits, axis=1))
    assert found.decided < ROWS / 2 and found.broken == 0


def test_nothing_decided_is_no_agreement() -> None:
    assert not Agreement(5, 5, 0, 0, 0.9, 0.9).holds


def test_scales_add_up() -> None:
    whole = agreement([Agreement(4, 3, 3, 0, 0.5, 0.1), Agreement(6, 6, 5, 1, 0.2, 0.3)])
    assert whole == Agreement(10, 9, 8, 1, 0.5, 0.2)
    assert whole.to_json()["holds"] is False
