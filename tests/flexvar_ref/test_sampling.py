"""Guidance weights, greedy scales, and the distribution that tokens are drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexvar_ref.errors import InvalidInput
from flexvar_ref.sampling import draw, guidance_weight, is_greedy, probabilities
from flexvar_ref.scales import as_scales

SCHEDULES = {
    10: "1_2_3_4_5_6_8_10_13_16",
    13: "1_2_3_4_5_6_7_8_9_10_12_14_16",
    15: "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32",
}
UNEVEN = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]  # cfg 2.5 over six scales


def weights(rule: str, cfg: float, schedule: str, max_side: int = 16) -> list[float]:
    scales = as_scales(schedule)
    return [guidance_weight(rule, cfg, i, len(scales), size, max_side) for i, size in enumerate(scales)]


@pytest.mark.parametrize(
    ("schedule", "cfg", "max_side", "expected"),
    [
        (SCHEDULES[10], 9.0, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (SCHEDULES[13], 9.0, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),  # beyond ten steps t exceeds cfg
        (SCHEDULES[15], 9.0, 16, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 9, 9]),  # cfg above max_side
        (SCHEDULES[15], 9.0, 32, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]),
        (SCHEDULES[10], 9.0, 8, [0, 1, 2, 3, 4, 5, 6, 9, 9, 9]),
        ("1_2_4_6_10_16", 2.5, 16, UNEVEN),
        ("1_2_4x3_6_4x17_16", 2.5, 16, [0.0, 0.5, 1.0, 1.5, 2.5, 2.5]),  # the larger side counts
        ("1_2", 3.0, 16, [0, 3]),
        ("1", 3.0, 16, [0]),
        (SCHEDULES[10], 0.0, 16, [0] * 10),
    ],
)
def test_ramp(schedule: str, cfg: float, max_side: int, expected: list[float]) -> None:
    assert weights("ramp", cfg, schedule, max_side) == pytest.approx(expected)


def test_constant() -> None:
    assert weights("constant", 4.0, SCHEDULES[15]) == [3.0] * 15
    assert weights("constant", 1.0, SCHEDULES[10]) == [0.0] * 10
    assert weights("constant", 4.0, "1") == [3.0]


def test_other_rules_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'off'.* ramp, constant"):
        guidance_weight("off", 1.0, 0, 1, (1, 1))


@pytest.mark.parametrize(
    ("schedule", "max_side", "greedy"),
    [
        (SCHEDULES[10], 16, []),
        (SCHEDULES[13], 16, [7, 9, 12, 14]),
        (SCHEDULES[15], 16, [7, 9, 12, 14, 23, 32]),
        (SCHEDULES[15], 32, [7, 9, 12, 14]),
        ("1_2_3_4_5_6_8_10_13_16_23_24_32_64", 64, [64]),
        (SCHEDULES[10], 5, [6, 8, 10, 13, 16]),
    ],
)
def test_greedy_scales(schedule: str, max_side: int, greedy: list[int]) -> None:
    assert [h for h, w in as_scales(schedule) if is_greedy((h, w), max_side)] == greedy


def test_the_greedy_rule_is_for_squares() -> None:
    assert not any(is_greedy(size) for size in ((7, 8), (9, 7), (12, 20), (40, 64)))


def naive(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The rule of `probabilities` for one row, in plain Python."""
    keep = list(range(len(logits)))
    if 0 < top_k < len(logits):
        threshold = sorted(logits)[-top_k]
        keep = [i for i in keep if logits[i] >= threshold]
    weight = {i: math.exp(float(logits[i]) - float(logits.max())) for i in keep}
    total = math.fsum(weight.values())
    if 0 < top_p < 1:
        dropped = 0.0
        for i in sorted(keep, key=lambda i: (weight[i], i))[:-1]:
            dropped += weight[i] / total
            if dropped <= 1 - top_p:
                del weight[i]
    total = math.fsum(weight.values())
    return np.array([weight.get(i, 0.0) / total for i in range(len(logits))])


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocabulary=st.integers(1, 40),
    levels=st.sampled_from([3, 2**20]),  # few levels: many ties
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 1e-9, 0.317, 0.5, 0.9, 0.95, 0.999, 1.0]),
)
def test_probabilities_follow_the_rule(seed: int, vocabulary: int, levels: int, top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, levels, vocabulary) * np.float32(4 / levels)).astype(np.float32)
    expected = naive(logits, top_k, top_p)
    got = probabilities(torch.from_numpy(logits), top_k, top_p).numpy()
    # the kept sets may differ only where a cumulative probability equals 1 − top_p up to rounding
    if (got > 0).sum() == (expected > 0).sum():
        np.testing.assert_array_equal(got > 0, expected > 0)
        np.testing.assert_allclose(got, expected, rtol=1e-9)
    else:
        weight = np.exp(logits.astype(np.float64))
        edge = np.cumsum(np.sort(weight / weight.sum()))
        assert np.abs(edge - (1 - top_p)).min() < 1e-12


def test_top_k_of_one_is_the_argmax() -> None:
    logits = torch.randn(3, 7, 50)
    probs = probabilities(logits, 1, 0.95)
    assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(-1), 50).double())
    assert torch.equal(draw(probs, torch.rand(3, 7)), logits.argmax(-1))


def test_ties_at_the_threshold_are_kept() -> None:
    probs = probabilities(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]), 2, 0)
    assert (probs > 0).tolist() == [False, True, True, True, False]
    assert probs[2] == probs[3]


def test_the_lower_index_is_dropped_first_at_the_boundary_of_top_p() -> None:
    probs = probabilities(torch.zeros(4), 0, 0.6)  # dropping 0.25 is allowed, 0.5 is not
    assert (probs > 0).tolist() == [False, True, True, True]


def test_exactly_one_minus_top_p_may_be_dropped() -> None:
    probs = probabilities(torch.zeros(4), 0, 0.5)
    assert (probs > 0).tolist() == [False, False, True, True]


def test_top_p_never_drops_the_top_token() -> None:
    for top_p in (1e-12, 1e-17):  # 1 − 1e-17 is 1 in float64
        assert probabilities(torch.tensor([0.0, 5.0, 1.0]), 0, top_p).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (0, 1.0), (50, 0.0), (51, 1.0)])
def test_off_is_the_softmax(top_k: int, top_p: float) -> None:
    logits = torch.randn(2, 50)
    torch.testing.assert_close(probabilities(logits, top_k, top_p), logits.double().softmax(-1))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.9), (10, 0.8)])
def test_a_constant_on_the_logits_changes_nothing(top_k: int, top_p: float) -> None:
    logits = torch.randint(-32, 32, (4, 50)) / 8  # exact in float32, the sum too
    assert torch.equal(probabilities(logits + 1000, top_k, top_p), probabilities(logits, top_k, top_p))


def test_draw_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-25, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs.expand(7, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    n = 20000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spread: counts are exact to one
    counts = torch.bincount(draw(probs.expand(n, 4), uniforms), minlength=4)
    torch.testing.assert_close(counts.double(), probs * n, atol=1, rtol=0)
