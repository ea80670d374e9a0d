"""The sampling rules against a plain per-row oracle, the published sampler's record, committed vectors and laws.

`python tests/runtime/model/test_sampling.py` writes vectors/sampling.json again, from the oracle.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from decimal import Decimal, localcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model import noise, sampling
from flexvar_runtime.model.sampling import Sampling, probabilities, sample

VECTORS = Path(__file__).parent / "vectors" / "sampling.json"
GOLDEN = Path(__file__).parents[2] / "golden" / "sampler.npz"
LAST_DRAW = 2**24 - 1


def oracle_weights(row: list[float], top_k: int, top_p: float) -> list[int]:
    """The integer weight of every token after top-k and top-p, 0 for the dropped: the rules word for word."""
    logits = [np.float32(value) for value in row]
    top = max(logits)
    with np.errstate(over="ignore"):
        weights = [math.floor(2**40 * math.exp(float(value - top))) for value in logits]
    if 0 < top_k < len(logits):
        threshold = sorted(logits)[-top_k]
        weights = [weight if value >= threshold else 0 for weight, value in zip(weights, logits, strict=True)]
    if 0 < top_p < 1:
        limit = math.floor((1.0 - top_p) * float(sum(weights)))
        cumulative = 0
        for index in sorted(range(len(weights)), key=lambda i: (weights[i], i))[:-1]:
            cumulative += weights[index]
            if cumulative > limit:
                break
            weights[index] = 0
    return weights


def oracle_token(weights: list[int], draw: int) -> int:
    r = math.floor((draw + 0.5) * 2.0**-24 * float(sum(weights)))
    return next(index for index, total in enumerate(accumulate(weights)) if total > r)


def kept(row: list[float] | NDArray[np.float32], top_k: int, top_p: float) -> list[int]:
    return [int(i) for i in np.flatnonzero(probabilities(row, top_k, top_p))]


def random_logits(seed: int, *shape: int, std: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(shape) * std).astype(np.float32)


# --- against the published sampler, the vectors, the oracle


def test_the_published_sampler_keeps_the_same_tokens() -> None:
    golden = np.load(GOLDEN)
    for i, (top_k, top_p) in enumerate(golden["combos"]):
        ours, published = probabilities(golden["logits"], int(top_k), float(top_p)), golden[f"probs_{i}"]
        assert np.array_equal(ours > 0, published > 0)
        assert np.abs(ours - published).max() < 1e-6  # the record is float32


def test_committed_vectors() -> None:
    for case in json.loads(VECTORS.read_text()):
        row, top_k, top_p = [float(value) for value in case["logits"]], case["top_k"], case["top_p"]
        assert kept(row, top_k, top_p) == case["kept"], case["name"]
        weights = oracle_weights(row, top_k, top_p)
        assert [i for i, weight in enumerate(weights) if weight] == case["kept"], case["name"]
        logits = np.tile(np.array(row, np.float32), (len(case["draws"]), 1))
        assert sample(logits, case["draws"], top_k=top_k, top_p=top_p).tolist() == case["tokens"], case["name"]
        assert [oracle_token(weights, draw) for draw in case["draws"]] == case["tokens"], case["name"]


LOGIT = st.sampled_from([-math.inf, -0.0, 0.0, 1.0, 1.0, 2.5, -27.75, -200.0]) | st.floats(-60, 60, width=32)
ROW_COUNT, MASS = st.integers(1, 24), st.sampled_from([0.0, 0.5, 0.9, 0.95, 1.0]) | st.floats(0, 1)


@settings(max_examples=250, deadline=None)
@given(data=st.data(), size=ROW_COUNT, top_k=st.integers(0, 26), top_p=MASS)
def test_any_rows_equal_the_oracle(data: st.DataObject, size: int, top_k: int, top_p: float) -> None:
    row = st.lists(LOGIT, min_size=size, max_size=size).filter(lambda values: max(values) > -math.inf)
    rows = data.draw(st.lists(row, min_size=1, max_size=5))
    draws = data.draw(st.lists(st.integers(0, LAST_DRAW), min_size=len(rows), max_size=len(rows)))
    distribution, tokens = probabilities(rows, top_k, top_p), sample(rows, draws, top_k=top_k, top_p=top_p)
    for values, draw, probability, token in zip(rows, draws, distribution, tokens, strict=True):
        weights = oracle_weights(values, top_k, top_p)
        assert (probability > 0).tolist() == [weight > 0 for weight in weights]
        exact = np.array(weights) / sum(weights)
        assert np.abs(probability - exact).max() < 1e-11  # math.exp and np.exp differ in the last bit
        assert token == oracle_token(weights, draw)


def test_real_sizes_equal_the_oracle() -> None:
    logits, draws = random_logits(1, 40, 8912), noise.draws(1, 0, 9, 40)
    tokens = sample(logits, draws, top_k=900, top_p=0.95)
    for row, draw, token in zip(logits, draws.tolist(), tokens, strict=True):
        weights = oracle_weights(row.tolist(), 900, 0.95)
        assert kept(row, 900, 0.95) == [i for i, weight in enumerate(weights) if weight]
        assert token == oracle_token(weights, draw)


# --- the exponential


def plain_scaled_exp(x: float) -> float:
    """2**40 * exp(x), rule by rule with Python's floats, which are IEEE doubles and never fused."""
    x = max(x, -28.0)
    k = (x * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    p = 1.0 / 6227020800.0
    for n in range(12, 1, -1):
        p = p * r + 1.0 / math.factorial(n)
    return (((p * r) * r + r) + 1.0) * 2.0 ** (k + 40)


def differences(count: int) -> NDArray[np.float32]:
    """Numbers from -28 to 0: even, of every exponent, and on both sides of where the reduction changes its step."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0x80000000, 0xC1E00000, count, dtype=np.uint32).view(np.float32)
    steps = ((np.arange(41) - 0.5) * -math.log(2)).astype(np.float32)[1:]
    around = [np.nextafter(steps, np.float32(bound)) for bound in (-99, 0)]
    return np.concatenate([-rng.random(count, np.float32) * 28, bits, steps, *around])


def test_exp_has_the_bits_of_the_rule() -> None:
    x = differences(5000)
    assert sampling._scaled_exp(x).tolist() == [plain_scaled_exp(value) for value in x.tolist()]


def test_exp_is_within_one_ulp() -> None:
    x = differences(5000)
    with localcontext(prec=40):
        for value, got in zip(x.tolist(), sampling._scaled_exp(x).tolist(), strict=True):
            exact = Decimal(value).exp() * 2**40
            assert abs(Decimal(got) - exact) < Decimal(math.ulp(float(exact)))


def test_exp_keeps_the_order() -> None:
    x = differences(50_000)
    assert (sampling._scaled_exp(np.nextafter(x, np.float32(-99))) <= sampling._scaled_exp(x)).all()


def test_known_weights() -> None:
    for x, weight in (
        *((0.0, 2**40), (-0.0, 2**40), (-1e-45, 2**40), (-1.0, 404487723187), (-10.0, 49917750), (-27.5, 1)),
        *((-27.725885391235352, 1), (-27.725887298583984, 0), (-28.5, 0), (-3e38, 0), (-math.inf, 0)),
    ):
        assert int(sampling._scaled_exp(np.array([x], np.float32))[0]) == weight


def test_exp_of_any_shape_and_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = differences(400)[:900].reshape(30, 30)
    whole = sampling._scaled_exp(x)
    assert np.array_equal(sampling._scaled_exp(x.T), whole.T)
    assert sampling._scaled_exp(x[:0]).shape == (0, 30)
    for block in (1, 7, 64):
        monkeypatch.setattr(sampling, "_EXP_BLOCK", block)
        assert np.array_equal(sampling._scaled_exp(x), whole)


# --- laws


@pytest.mark.parametrize("top_p", [0.0, 0.5, 0.95, 1.0])
def test_top_k_1_is_argmax(top_p: float) -> None:
    logits = random_logits(2, 200, 500)
    assert np.array_equal(sample(logits, noise.draws(0, 0, 0, 200), top_k=1, top_p=top_p), logits.argmax(axis=1))


@pytest.mark.parametrize("constant", [-1024.0, 0.5, 64.0])
def test_adding_a_constant_changes_nothing(constant: float) -> None:
    logits = np.random.default_rng(3).integers(-400, 400, (50, 300)).astype(np.float32) / 16  # sums exact in float32
    shifted = logits + np.float32(constant)
    assert np.array_equal(probabilities(logits, 100, 0.9), probabilities(shifted, 100, 0.9))
    draws = noise.draws(0, 0, 0, 50)
    assert np.array_equal(sample(logits, draws, top_k=100, top_p=0.9), sample(shifted, draws, top_k=100, top_p=0.9))


def test_minus_infinity_is_never_drawn() -> None:
    row = [-math.inf, 0.0, -math.inf, -1.0, -math.inf]
    for top_k, top_p in [(0, 0.0), (4, 0.0), (0, 0.9), (4, 0.999)]:
        assert kept(row, top_k, top_p) == [1, 3]
        tokens = sample([row] * 1002, [0, LAST_DRAW, *range(1000)], top_k=top_k, top_p=top_p)
        assert set(tokens.tolist()) <= {1, 3}


def test_a_draw_on_the_boundary_takes_the_next_token() -> None:
    row = [-0.4321441650390625, 0.0]
    weight = oracle_weights(row, 0, 0.0)[0]
    draw = 6603754
    assert math.floor((draw + 0.5) * 2.0**-24 * (weight + 2**40)) == weight  # r equals the first cumulative weight
    assert sample([row] * 3, [draw - 1, draw, draw + 1], top_k=0, top_p=0.0).tolist() == [0, 1, 1]


def test_ties_at_the_top_k_threshold_are_kept() -> None:
    assert kept([1, 3, 1, 2, 1, 0], 3, 0.0) == [0, 1, 2, 3, 4]
    assert kept([5, 5, 5, 4], 1, 0.0) == [0, 1, 2]


def test_top_p_drops_the_lower_index_first_and_the_top_token_never() -> None:
    assert kept([0, 0, 0, 0], 0, 0.5) == [2, 3]  # cumulative 2 of 4 <= 1/2: dropped
    assert kept([0, 0, 0, 0], 0, 0.51) == [1, 2, 3]
    assert kept([0, 0, 0, 0], 0, 1e-300) == [3]
    assert kept([9, 0, 0, 0], 0, 1e-300) == [0]


@pytest.mark.parametrize("off", [(0, 0.0), (0, 1.0), (300, 0.0), (301, 1.0), (10**9, 0)])
def test_off_means_off(off: tuple[int, float]) -> None:
    logits = random_logits(4, 5, 300)
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    assert np.allclose(probabilities(logits, *off), exact / exact.sum(axis=1, keepdims=True), atol=1e-7)


@pytest.mark.parametrize("draw", [0, LAST_DRAW])
def test_no_extreme_leaves_a_row_without_a_token(draw: int) -> None:
    flat = np.zeros((1, 2**17), dtype=np.float32)  # the largest possible sum: 2**57, beyond float64's integers
    assert sample(flat, [draw], top_k=0, top_p=0.0)[0] == (draw * 2**17 + 2**16) >> 24
    steep = np.array([[-3e38, 3e38, -math.inf]], np.float32)  # the difference overflows float32
    assert sample(steep, [draw], top_k=0, top_p=0.0).tolist() == [1]
    assert sample([[-7.0]], [draw], top_k=5, top_p=0.5).tolist() == [0]


@pytest.mark.parametrize("options", [(0, 0.0), (1, 0.95), (90, 0.0), (90, 0.95), (0, 0.95)])
def test_blocks_batches_and_row_positions_do_not_matter(options: tuple[int, float], monkeypatch: Any) -> None:
    logits = np.round(random_logits(5, 100, 777) * 4) / 4  # many ties: rows keep different counts
    draws, (top_k, top_p) = noise.draws(5, 0, 0, 100), options
    tokens, distribution = sample(logits, draws, top_k=top_k, top_p=top_p), probabilities(logits, top_k, top_p)
    for rows_per_block in (1, 3, 7, 1000):
        monkeypatch.setattr(sampling, "_ROWS_PER_BLOCK", rows_per_block)
        assert np.array_equal(sample(logits, draws, top_k=top_k, top_p=top_p), tokens)
        assert np.array_equal(probabilities(logits, top_k, top_p), distribution)
    monkeypatch.undo()
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(sample(logits[order], draws[order], top_k=top_k, top_p=top_p), tokens[order])
    for i in (0, 50, 99):
        assert sample(logits[i : i + 1], draws[i : i + 1], top_k=top_k, top_p=top_p)[0] == tokens[i]
        assert np.array_equal(probabilities(logits[i], top_k, top_p), distribution[i])


def float32_tokens(row: NDArray[np.float32], draws: NDArray[np.uint32], block: int) -> NDArray[np.intp]:
    """Negative control: inverse CDF in float32, summed one by one (block = V) or in blocks."""
    weights = np.exp(row - row.max())
    weights /= weights.sum()
    within = [np.cumsum(weights[start : start + block]) for start in range(0, len(weights), block)]
    offsets = np.cumsum([0, *(part[-1] for part in within[:-1])], dtype=np.float32)
    cdf = np.concatenate([part + offset for part, offset in zip(within, offsets, strict=True)])
    return np.searchsorted(cdf, noise.to_uniform(draws).astype(np.float32), side="right")


def test_the_order_of_summation_cannot_matter() -> None:
    rows, draws_per_row, size = 40, 1000, 900
    disagreements = 0
    for i, row in enumerate(random_logits(6, rows, size)):
        draws = noise.draws(6, i, 0, draws_per_row)
        tokens = sample(np.broadcast_to(row, (draws_per_row, size)), draws, top_k=0, top_p=0.0)
        sequential = list(accumulate(oracle_weights(row.tolist(), 0, 0.0)))
        r = [math.floor(u * float(sequential[-1])) for u in noise.to_uniform(draws).tolist()]
        assert tokens.tolist() == [bisect_right(sequential, target) for target in r]
        weights = np.array(oracle_weights(row.tolist(), 0, 0.0))
        for block in (32, 128, 300):
            parts = [weights[start : start + block] for start in range(0, size, block)]
            offsets = np.cumsum([0, *(part.sum() for part in parts[:-1])])
            blocked = np.concatenate([part.cumsum() + offset for part, offset in zip(parts, offsets, strict=True)])
            assert np.array_equal(np.searchsorted(blocked, r, side="right"), tokens)
        disagreements += int((float32_tokens(row, draws, size) != float32_tokens(row, draws, 128)).sum())
    print(f"float32 CDFs disagree on {disagreements} of {rows * draws_per_row} draws")
    assert disagreements > 0


@pytest.mark.parametrize(("tilt", "fits"), [(1.0, True), (1.1, False)])
def test_draws_follow_the_distribution(tilt: float, fits: bool) -> None:
    row, n = random_logits(7, 60, std=1.0), 100_000
    tokens = sample(np.broadcast_to(row, (n, 60)), noise.draws(7, 0, 0, n), top_k=40, top_p=0.97)
    expected = probabilities(row * np.float32(tilt), 40, 0.97) * n  # tilt 1.1: the wrong distribution is noticed
    support = expected > 0
    counts = np.bincount(tokens, minlength=60)
    chi_square = float(((counts - expected)[support] ** 2 / expected[support]).sum())
    freedom = int(support.sum()) - 1
    assert (chi_square < freedom + 4 * math.sqrt(2 * freedom)) == fits  # four standard deviations; the draws are fixed
    assert not fits or counts[~support].sum() == 0


def test_shapes_and_types() -> None:
    logits = random_logits(8, 2, 3, 50)
    distribution = probabilities(logits, 10, 0.9)
    assert distribution.shape == (2, 3, 50)
    assert distribution.dtype == np.float64
    assert np.allclose(distribution.sum(axis=-1), 1, atol=1e-12)
    assert np.array_equal(probabilities(np.asfortranarray(logits[:, ::2]), 10, 0.9), distribution[:, ::2])
    assert np.array_equal(probabilities(logits.astype(np.float64), 10, 0.9), distribution)
    assert probabilities(logits[:0], 10, 0.9).shape == (0, 3, 50)
    assert sample(logits[0], np.arange(3), top_k=10, top_p=0.9).dtype == np.int32
    assert sample(np.zeros((0, 50), np.float32), np.zeros(0, np.uint32), top_k=10, top_p=0.9).shape == (0,)


# --- refusals


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("bad", [[0, NAN], [0, INF], [-INF, -INF], [NAN, -INF], [1e39, 0]])
def test_rows_without_a_distribution_are_refused(bad: list[float]) -> None:
    rows = [[0.0, 1.0]] * 20 + [bad]
    for call in (lambda: probabilities(rows, 0, 0.0), lambda: sample(rows, [0] * 21, top_k=1, top_p=0.5)):
        with pytest.raises(InvalidInput, match="row 20"):
            call()


def test_bad_shapes_and_draws_are_refused() -> None:
    logits = np.zeros((2, 5), dtype=np.float32)
    for draws in ([0], [0, 2**24], [0, -1], [0.5, 0.5], [[0, 0]]):
        with pytest.raises(InvalidInput, match=r"^draws "):
            sample(logits, draws, top_k=0, top_p=0.0)
    for shape in [(), (3, 0)]:
        with pytest.raises(InvalidInput, match=r"^logits "):
            probabilities(np.zeros(shape, dtype=np.float32), 0, 0.0)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("top_k", bad) for bad in (-1, 1.5, NAN, True, "9", None)),
        *(("top_p", bad) for bad in (-0.1, 1.1, NAN, INF, True, "0.9", None)),
    ],
)
def test_bad_top_k_and_top_p_are_refused(name: str, bad: Any) -> None:
    options: dict[str, Any] = {"top_k": 0, "top_p": 0.0} | {name: bad}
    for call in (
        lambda: Sampling(**options),
        lambda: probabilities([0.0], **options),
        lambda: sample([[0.0]], [0], **options),
    ):
        with pytest.raises(InvalidInput, match=rf"^{name} is") as refusal:
            call()
        assert repr(bad) in refusal.value.got


# --- options


def test_defaults_are_the_published_evaluation() -> None:
    options = Sampling()
    assert (options.top_k, options.top_p, options.greedy_scales, options.max_side) == (900, 0.95, "upstream", 16)
    numpy_numbers: Any = np.int64(5), np.float32(0.5)
    assert Sampling(*numpy_numbers) == Sampling(top_k=5, top_p=0.5)
    assert type(Sampling(top_p=1).top_p) is float
    assert hash(Sampling(greedy_scales=(7,))) == hash(Sampling(greedy_scales="7"))


def test_the_published_greedy_rule() -> None:
    greedy = [side for side in range(1, 33) if Sampling().greedy(side, side)]
    assert greedy == [7, 9, 11, 12, 14, 15, *range(17, 33)]
    wide = [side for side in range(1, 41) if not Sampling(max_side=32).greedy(side, side)]
    assert wide == [1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32]
    assert not Sampling().greedy(7, 9)
    assert not Sampling().greedy(12, 20)
    assert (Sampling().top_k_at(7, 7), Sampling().top_k_at(8, 8)) == (1, 900)
    assert not any(Sampling(greedy_scales="none").greedy(side, side) for side in range(1, 40))


@pytest.mark.parametrize("scales", ["7,12x20", " 12x20, 7 ,7x7", (7, (12, 20)), ((12, 20), (np.int64(7), 7))])
def test_named_greedy_scales(scales: Any) -> None:
    options = Sampling(greedy_scales=scales)
    assert options.greedy_scales == ((7, 7), (12, 20))
    assert options.to_json()["greedy_scales"] == "7,12x20"
    assert options.greedy(7, 7)
    assert options.greedy(12, 20)
    assert not options.greedy(20, 12)
    assert not options.greedy(9, 9)
    assert options.top_k_at(12, 20) == 1


BAD_SCALES = ["", "7,", "x7", "7x", "0", "seven", "7x9x2", "Upstream", (0,), (True,), ((7,),), (7.0,), [7]]


@pytest.mark.parametrize("bad", BAD_SCALES)
def test_bad_greedy_scales_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidInput, match="greedy_scales"):
        Sampling(greedy_scales=bad)


def test_a_bad_max_side_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^max_side is 0"):
        Sampling(max_side=0)


@pytest.mark.parametrize("scales", ["upstream", "none", "7,12x20", ()])
def test_json_round_trip(scales: Any) -> None:
    options = Sampling(top_k=5, top_p=0.3, greedy_scales=scales, max_side=32)
    assert Sampling.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert Sampling.from_json({}) == Sampling()


def test_bad_json_is_refused() -> None:
    for bad, named in (({"top_k": 9, "temperature": 1.0}, "temperature"), ([900], "900"), ({"top_k": "900"}, "top_k")):
        with pytest.raises(InvalidInput, match=named):
            Sampling.from_json(bad)  # type: ignore[arg-type]


def test_filters_that_act() -> None:
    options = [(900, 0.95), (900, 0), (0, 0.95), (0, 1), (0, 0)]
    assert [Sampling(*each).filters for each in options] == ["top-k, top-p", "top-k", "top-p", "none", "none"]


# --- the committed vectors


def make_vectors() -> list[dict[str, Any]]:
    inf = math.inf
    rows = {
        "boundary": [-0.4321441650390625, 0.0],  # the draw 6603754 hits the first cumulative weight exactly
        "flat": [0.0] * 8,
        "ties": [1.0, 3.0, 1.0, 2.0, 1.0, 0.0, 3.0, -4.0],
        "masked": [-inf, 0.5, -inf, -1.25, 2.0, -inf, 2.0, -30.0],
        "wide": random_logits(100, 64, std=8.0).tolist(),
        "narrow": random_logits(101, 64, std=0.5).tolist(),
    }
    draws = [0, 1, 6603754, LAST_DRAW // 2, LAST_DRAW, *noise.draws(2**63, 0, 0, 12).tolist()]
    cases = []
    for name, row in rows.items():
        for top_k, top_p in [(0, 0.0), (1, 0.95), (3, 0.0), (0, 0.5), (5, 0.9), (20, 0.95), (1000, 1.0)]:
            weights = oracle_weights(row, top_k, top_p)
            case = {"name": f"{name}-k{top_k}-p{top_p}", "top_k": top_k, "top_p": top_p}
            case["logits"] = [value if math.isfinite(value) else str(value) for value in row]
            case["kept"] = [i for i, weight in enumerate(weights) if weight]
            case |= {"draws": draws, "tokens": [oracle_token(weights, draw) for draw in draws]}
            cases.append(case)
    return cases


if __name__ == "__main__":
    VECTORS.write_text("[\n" + ",\n".join(json.dumps(case) for case in make_vectors()) + "\n]\n")
