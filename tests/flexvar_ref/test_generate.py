"""Generation: cached equals uncached, guidance and greedy scales follow their rules, and requests are checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexvar_ref import FlexVAR, Options, Tokenizer, as_scales, generate, iter_scales, token_count
from flexvar_ref.errors import InvalidInput
from flexvar_ref.sampling import guidance_weight

Pair = tuple[FlexVAR, Tokenizer]
RandomTokens = Callable[..., list[torch.Tensor]]
NOISE = 1e-4  # float32 noise on logits of standard deviation 4: sums in another order
OFF = Options(cfg=0)


def uniforms(scale: int, positions: int, batch: int) -> torch.Tensor:
    """Uniforms with one stream for each image, so that its draws do not depend on the batch."""
    rows = []
    for image in range(batch):
        generator = torch.Generator().manual_seed(1000 * scale + image)
        rows.append(torch.rand(positions, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def uncached(
    model: FlexVAR, labels: list[int], tokens: list[torch.Tensor], scales: Any, rule: str, cfg: float
) -> list[torch.Tensor]:
    """Guided logits of every scale from two teacher-forced passes under the mask."""
    with torch.inference_mode():
        cond = model(labels, tokens, scales)
        uncond = model([model.config.null_class] * len(labels), tokens, scales)
    sizes = [h * w for h, w in scales]
    return [
        c + guidance_weight(rule, cfg, i, len(scales), size) * (c - u)
        for i, (c, u, size) in enumerate(zip(cond.split(sizes, 1), uncond.split(sizes, 1), scales, strict=True))
    ]


sides = st.integers(1, 7)


@settings(deadline=None, max_examples=20)
@given(
    later=st.lists(st.tuples(sides, sides), max_size=5),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_cached_equals_uncached(tiny: Pair, later: list[tuple[int, int]], batch: int, seed: int) -> None:
    """Forced tokens through the cache give the logits of one masked pass, and the same tokens from them."""
    model, scales = tiny[0], as_scales([1, *later])
    generator = torch.Generator().manual_seed(seed)
    forced = [torch.randint(512, (batch, h, w), generator=generator) for h, w in scales]
    labels = torch.randint(11, (batch,), generator=generator).tolist()
    options = Options(cfg=0, top_k=1)
    steps = list(iter_scales(model, labels, scales, options, forced=forced))
    with torch.inference_mode():
        logits_BLV = model(labels, forced, scales)
    parts = logits_BLV.split([h * w for h, w in scales], dim=1)
    for step, expected, size in zip(steps, parts, scales, strict=True):
        assert step.size == size
        torch.testing.assert_close(step.logits, expected, atol=NOISE, rtol=0)
        best = expected.topk(2).values
        clear = (best[..., 0] - best[..., 1]).view(step.tokens.shape) > 2 * NOISE
        assert torch.equal(step.tokens[clear], expected.argmax(-1).view(step.tokens.shape)[clear])


@pytest.mark.parametrize(
    ("schedule", "rule", "cfg"),
    [
        ("1_2_3_4_5_6_7_8_9_10_12_14_16", "ramp", 2.5),  # beyond ten scales
        ("1_2_3x5_12x20", "ramp", 2.5),
        ("1_2_3x5_12x20", "constant", 4.0),
    ],
)
def test_guided_logits(tiny: Pair, random_tokens: RandomTokens, schedule: str, rule: str, cfg: float) -> None:
    model, scales = tiny[0], as_scales(schedule)
    forced = random_tokens(scales, 2, 512)
    steps = iter_scales(model, [3, 10], scales, Options(cfg=cfg, rule=rule), forced=forced)
    expected = uncached(model, [3, 10], forced, scales, rule, cfg)
    for step, logits in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.logits, logits, atol=10 * NOISE, rtol=0)  # t multiplies the noise


def test_the_ramp_jumps_above_max_side(tiny: Pair, random_tokens: RandomTokens) -> None:
    model, scales = tiny[0], as_scales("1_2_3_5")
    forced = random_tokens(scales, 1, 512)
    low, high = (list(iter_scales(model, [3], scales, Options(max_side=side), forced=forced)) for side in (2, 16))
    cond, uncond = (model([label], forced, scales)[:, 5:14] for label in (3, 10))
    torch.testing.assert_close(low[2].logits, cond + 2.5 * (cond - uncond), atol=10 * NOISE, rtol=0)
    torch.testing.assert_close(high[2].logits, cond + 2.5 * 2 / 3 * (cond - uncond), atol=10 * NOISE, rtol=0)
    for i in (0, 1, 3):
        assert torch.equal(low[i].logits, high[i].logits)


def test_swapped_branches_exceed_the_bound(tiny: Pair, random_tokens: RandomTokens) -> None:
    """Negative control: the guided logits of swapped branches are far from the true ones."""
    model, scales = tiny[0], as_scales("1_2_3")
    forced = random_tokens(scales, 1, 512)
    step = list(iter_scales(model, [3], scales, Options(cfg=4, rule="constant"), forced=forced))[-1]
    swapped = uncached(model, [3], forced, scales, "constant", -3)[-1]  # uncond + 3 · (uncond − cond)
    assert (step.logits - swapped).abs().max() > 1


def test_forcing_its_own_tokens_changes_nothing(tiny: Pair) -> None:
    model, scales = tiny[0], as_scales("1_2_3x2_4")
    free = list(iter_scales(model, [1, 2], scales, uniforms=uniforms))
    tokens = [step.tokens for step in free]
    for forced in (tokens, tokens[:-1]):
        again = list(iter_scales(model, [1, 2], scales, uniforms=uniforms, forced=forced))
        for a, b in zip(free, again, strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logits, b.logits)


@pytest.mark.parametrize("options", [OFF, Options(cfg=1, rule="constant")])
def test_guidance_off_runs_one_branch(tiny: Pair, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    model, batches = tiny[0], []
    step = model.step
    monkeypatch.setattr(model, "step", lambda x, *rest: (batches.append(len(x)), step(x, *rest))[1])
    off = list(iter_scales(model, [1, 2], "1_2_3", options, uniforms))
    assert batches == [2, 2, 2]
    list(iter_scales(model, [1, 2], "1_2_3", Options(), uniforms))
    assert batches[3:] == [4, 4, 4]
    for a, b in zip(off, iter_scales(model, [1, 2], "1_2_3", OFF, uniforms), strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logits, b.logits)


def test_a_weight_of_zero_is_the_conditional_branch(tiny: Pair, random_tokens: RandomTokens) -> None:
    """The constant rule just above 1 runs both branches and comes out where guidance off does."""
    model, scales = tiny[0], as_scales("1_2_3")
    forced = random_tokens(scales, 2, 512)
    almost = Options(cfg=1 + 1e-7, rule="constant")
    for a, b in zip(
        iter_scales(model, [1, 2], scales, almost, forced=forced),
        iter_scales(model, [1, 2], scales, OFF, forced=forced),
        strict=True,
    ):
        torch.testing.assert_close(a.logits, b.logits, atol=NOISE, rtol=0)


def test_batch_position_does_not_matter(tiny: Pair) -> None:
    """Image 1 of three is image 0 of one, with the same draws."""
    model, scales = tiny[0], "1_2_3_4x6"
    together = list(iter_scales(model, [1, 5, 9], scales, Options(top_k=50), uniforms))

    def second(scale: int, positions: int, batch: int) -> torch.Tensor:
        return uniforms(scale, positions, batch + 1)[1:]

    alone = list(iter_scales(model, [5], scales, Options(top_k=50), second))
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.tokens[1:2], b.tokens)
        torch.testing.assert_close(a.logits[1:2], b.logits, atol=10 * NOISE, rtol=0)


def test_greedy_scales(tiny: Pair) -> None:
    """The argmax is taken at 7x7, as in the published evaluation, and only on request. It is never taken at 7x8."""
    model, schedule = tiny[0], "1_4_7_7x8"

    def greedy(**options: Any) -> list[bool]:
        steps = iter_scales(model, [1], schedule, Options(cfg=0, top_k=0, top_p=0, **options), uniforms)
        return [torch.equal(step.tokens.flatten(), step.logits[0].argmax(-1)) for step in steps]

    assert greedy()[1:] == [False, True, False]
    assert greedy(upstream_greedy=False)[1:] == [False, False, False]
    assert greedy(max_side=3)[1:] == [True, True, False]


def test_the_same_draws_give_the_same_image(tiny: Pair) -> None:
    first, second = (generate(*tiny, [3, 4], "1_2_5x3", uniforms=uniforms) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])
    torch.manual_seed(1)
    default = generate(*tiny, [3, 4], "1_2_5x3")
    torch.manual_seed(1)
    assert torch.equal(default[1], generate(*tiny, [3, 4], "1_2_5x3")[1])


@pytest.mark.parametrize("schedule", ["1", "1_2_4_8", "1_2x3_5x3_4x12"])
def test_shapes(tiny: Pair, schedule: str) -> None:
    model, tokenizer = tiny
    scales = as_scales(schedule)
    tokens, images = generate(model, tokenizer, [0, model.config.null_class], schedule)
    assert [scale.shape[1:] for scale in tokens] == list(scales)
    assert sum(scale.numel() for scale in tokens) == 2 * token_count(scales)
    h, w = scales[-1]
    assert images.shape == (2, 3, 4 * h, 4 * w)
    assert images.isfinite().all()


def test_encode_quantize_generate_decode(tiny: Pair) -> None:
    """Image to image: the first scales are an image's tokens, and the last one is generated."""
    model, tokenizer = tiny
    scales = as_scales("1_2_4_8")
    with torch.inference_mode():
        known = tokenizer.quantize(tokenizer.encode(torch.rand(1, 3, 32, 32) * 2 - 1), scales)
        last = list(iter_scales(model, [10], scales, forced=known[:-1]))[-1]
        assert tokenizer.decode(last.tokens).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"labels": []}, r"labels is \[\].*0 to 10"),
        ({"labels": [11]}, r"labels is \[11\].*0 to 10"),
        ({"labels": [-1]}, r"labels is \[-1\]"),
        ({"scales": "2_3"}, "schedule .*2x2"),
        ({"scales": "1_two"}, "schedule .*'1_two'"),
        ({"forced": [torch.zeros(1, 1, 1)]}, "forced .* 1 .* 3"),
        ({"uniforms": lambda scale, positions, batch: torch.rand(positions)}, r"uniforms .*\(1,\).*\(1, 1\)"),
    ],
)
def test_requests_that_do_not_fit_are_refused(tiny: Pair, change: dict[str, Any], fault: str) -> None:
    request = {"labels": [1], "scales": "1_2_3", **change}
    with pytest.raises(InvalidInput, match=fault):
        list(iter_scales(tiny[0], **request))


def test_a_model_in_training_mode_is_refused(tiny: Pair) -> None:
    model = copy.deepcopy(tiny[0]).train()
    with pytest.raises(InvalidInput, match="training mode") as caught:
        list(iter_scales(model, [1], "1_2"))
    assert "model.eval()" in caught.value.fix


@pytest.mark.parametrize(
    "change", [{"rule": "off"}, {"cfg": float("nan")}, {"top_k": -1}, {"top_p": 1.5}, {"max_side": 0}]
)
def test_options_out_of_range_are_refused(change: dict[str, Any]) -> None:
    [(name, value)] = change.items()
    with pytest.raises(InvalidInput) as caught:
        Options(**change)
    assert f"{name} is {value!r}" in caught.value.got
