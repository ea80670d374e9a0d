"""The modules behind the graphs equal the reference, for any split into past and new."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flexvar_export.modules import Condition, Float32GroupNorm, Prefill, Step, graph_module
from flexvar_ref import FlexVAR, Options, Tokenizer, as_scales, iter_scales
from flexvar_ref.sampling import guidance_weight
from flexvar_runtime.model.signatures import MODULATION

Pair = tuple[FlexVAR, Tokenizer]
SCALES = as_scales("1_2x3_4_3x6")
LABELS = [1, 7]
NOISE = 1e-5  # the gate of float32: sums in another order, up to 3e-6 of the whole


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def split(outputs: tuple[Tensor, ...]) -> tuple[list[list[Tensor]], list[Tensor], Tensor]:
    """The outputs of `Condition` in the form of `Step`: six parts of all blocks, two of the head, the first input."""
    *parts, scale, shift, first = outputs
    depth = len(parts) // len(MODULATION)
    return [parts[i : i + depth] for i in range(0, len(parts), depth)], [scale, shift], first


def conditioned(model: FlexVAR, labels: list[int]) -> tuple[list[list[Tensor]], list[Tensor], Tensor]:
    return split(Condition(model, torch.float32)(torch.tensor(labels, dtype=torch.int32)))


def step_through(
    model: FlexVAR, labels: list[int], branches: list[int], weights: list[float], forced: list[Tensor]
) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """Run `Step` as a runtime does. Yield the logits, and the keys and values so far, of every scale.

    branches: the labels of all sequences. Those of the images come first.
    """
    step = Step(model, torch.float32).eval()
    modulation, head, first = conditioned(model, branches)
    N, B = len(branches), len(labels)
    rows = torch.arange(B, dtype=torch.int32)
    shape = (0, N, model.config.heads, model.config.head_size)
    past = [torch.zeros(shape) for _ in range(2 * model.config.depth)]
    for i, size in enumerate(SCALES):
        if i == 0:
            codes, offset = torch.zeros(N, 1, model.config.code_dim), first
        else:
            codes = model.next_codes(forced[i - 1], SCALES[i - 1], size).repeat(N // B, 1, 1)
            offset = (model.positions(*size) + model.word_embed.bias).expand(N, -1, -1)
        t = torch.full((B,), weights[i])
        depth = model.config.depth
        logits, keys, values = step(
            codes, offset, *modulation, *head, rows, rows + (N - B), t, past[:depth], past[depth:]
        )
        past = [torch.cat(pair) for pair in zip(past, (*keys, *values), strict=True)]
        yield logits, past[:depth], past[depth:]


@pytest.fixture
def forced(tiny_pair: Pair) -> list[Tensor]:
    vocabulary = tiny_pair[0].config.vocabulary
    return [torch.randint(vocabulary, (len(LABELS), h, w)) for h, w in SCALES]


@pytest.mark.parametrize(("cfg", "rule"), [(2.5, "ramp"), (4.0, "constant"), (0.0, "ramp")])
def test_step_equals_the_reference_over_a_schedule(
    tiny_pair: Pair, forced: list[Tensor], cfg: float, rule: str
) -> None:
    """An image has two sequences with guidance, and one without. The first scale has no past."""
    model = tiny_pair[0]
    branches = LABELS + ([model.config.null_class] * len(LABELS) if cfg else [])
    weights = [guidance_weight(rule, cfg, i, len(SCALES), size, 16) for i, size in enumerate(SCALES)]
    expected = list(iter_scales(model, LABELS, SCALES, Options(cfg=cfg, rule=rule), forced=forced))
    got = list(step_through(model, LABELS, branches, weights, forced))
    assert len(got) == len(expected) == len(SCALES)
    for (logits, _, _), scale in zip(got, expected, strict=True):
        assert logits.shape == scale.logits.shape
        assert error(logits, scale.logits) < NOISE


def test_keys_and_values_equal_the_cache_of_the_reference(tiny_pair: Pair, forced: list[Tensor]) -> None:
    model = tiny_pair[0]
    cache, cond = None, model.condition(torch.tensor(LABELS))
    inputs = [model.first_input(torch.tensor(LABELS))]
    for tokens, size, following in zip(forced, SCALES, SCALES[1:], strict=False):
        inputs.append(model.next_input(tokens, size, following))
    scales = step_through(model, LABELS, LABELS, [0.0] * len(SCALES), forced)
    for x, (_, keys, values) in zip(inputs, scales, strict=True):
        _, cache = model.step(x, cond, cache)
        for got, expected in zip((*keys, *values), (*cache.keys, *cache.values), strict=True):
            assert error(got.permute(1, 2, 0, 3), expected) < NOISE  # token-major here


def test_prefill_computes_the_keys_and_values_of_all_steps(tiny_pair: Pair, forced: list[Tensor]) -> None:
    """They equal the cache of the reference and of `Step`, up to float32 noise."""
    model = tiny_pair[0]
    labels = torch.tensor(LABELS)
    expected = model.prefill(labels, forced, SCALES)
    *_, (_, stepped_keys, stepped_values) = step_through(model, LABELS, LABELS, [0.0] * len(SCALES), forced)
    modulation, _, _ = conditioned(model, LABELS)
    for part in (modulation[0], modulation[1], modulation[3], modulation[5]):
        part.pop()  # the last block only gives keys and values
    codes, offset = [torch.zeros(len(LABELS), 1, model.config.code_dim)], [model.first_input(labels)]
    for tokens, size, following in zip(forced, SCALES, SCALES[1:], strict=False):
        codes.append(model.next_codes(tokens, size, following))
        offset.append((model.positions(*following) + model.word_embed.bias).expand(len(LABELS), -1, -1))
    scale = torch.cat([torch.full((h * w,), i, dtype=torch.int32) for i, (h, w) in enumerate(SCALES)])
    keys, values = Prefill(model, torch.float32)(torch.cat(codes, 1), torch.cat(offset, 1), *modulation, scale)
    for got, reference, stepped in zip(
        (*keys, *values),
        (*expected.keys, *expected.values),
        (*stepped_keys, *stepped_values),
        strict=True,
    ):
        assert got.shape == stepped.shape
        assert error(got.permute(1, 2, 0, 3), reference) < NOISE and error(got, stepped) < NOISE


def test_guiding_before_the_head_equals_guiding_after_it(tiny_pair: Pair, forced: list[Tensor]) -> None:
    model, t = tiny_pair[0], [0.0, 0.8, 1.7, 3.0]
    null = [model.config.null_class] * len(LABELS)
    plain = [0.0] * len(SCALES)
    before = step_through(model, LABELS, LABELS + null, t, forced)
    branches = (step_through(model, LABELS, labels, plain, forced) for labels in (LABELS, null))
    for weight, (guided, _, _), (cond, _, _), (uncond, _, _) in zip(t, before, *branches, strict=True):
        assert error(guided, (1 + weight) * cond - weight * uncond) < NOISE * (1 + 2 * weight)  # which scales noise too


def test_row_indices_choose_the_branches(tiny_pair: Pair) -> None:
    """Swapped rows guide the other way, and equal rows not at all."""
    model = tiny_pair[0]
    null = model.config.null_class
    modulation, head, first = conditioned(model, [3, null])
    step = Step(model, torch.float32).eval()
    codes, past = torch.zeros(2, 1, model.config.code_dim), [torch.zeros(0, 2, model.config.heads, 64)] * 2

    def logits(cond: int, uncond: int, t: float) -> Tensor:
        rows = (torch.tensor([row], dtype=torch.int32) for row in (cond, uncond))
        result: Tensor = step(codes, first, *modulation, *head, *rows, torch.tensor([t]), past, past)[0]
        return result

    conditional, unconditional = logits(0, 0, 5.0), logits(1, 1, 5.0)
    assert error(logits(0, 1, 2.0), 3 * conditional - 2 * unconditional) < NOISE * 5
    assert error(logits(1, 0, 2.0), 3 * unconditional - 2 * conditional) < NOISE * 5
    assert error(conditional, unconditional) > 0.1


def test_condition_equals_the_reference(tiny_pair: Pair) -> None:
    model = tiny_pair[0]
    labels = list(range(model.config.classes + 1))
    modulation, head, first = conditioned(model, labels)
    cond = model.condition(torch.tensor(labels))
    for i, block in enumerate(model.blocks):
        assert error(torch.cat([part[i] for part in modulation], 1).flatten(1), block.ada_lin(cond)) < NOISE
    assert error(torch.cat(head, 1).flatten(1), model.head_nm.ada_lin(cond)) < NOISE
    assert error(first, model.first_input(torch.tensor(labels))) < NOISE


def test_the_common_part_of_all_classes_is_not_rounded(tiny_pair: Pair) -> None:
    """In a trained model it is large. Rounded to bfloat16, its error would exceed the differences of classes."""
    model = copy.deepcopy(tiny_pair[0])
    model.class_emb.weight.add_(2.0)
    linear = model.head_nm.ada_lin.linear
    linear.weight[: model.config.width].add_(0.2)
    labels = torch.arange(model.config.classes + 1, dtype=torch.int32)
    expected = model.head_nm.ada_lin(model.condition(labels.long())).unflatten(1, (2, -1))
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    got = torch.cat(split(Condition(model, torch.bfloat16)(labels))[1], 1)
    assert float((got - expected).norm() / spread) < 0.005
    plain = copy.deepcopy(linear).bfloat16()(torch.nn.functional.silu(model.condition(labels.long())).bfloat16())
    assert float((plain.float().view_as(expected) - expected).norm() / spread) > 0.015  # the gate


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_decode_and_encode_equal_the_reference(tiny_pair: Pair, size: tuple[int, int]) -> None:
    tokenizer = tiny_pair[1]
    tokens = torch.randint(tokenizer.config.vocabulary, (2, *size), dtype=torch.int32)
    decoded = graph_module("decode", *tiny_pair, torch.float32)(tokens)
    assert error(decoded, tokenizer.decode(tokens)) < NOISE
    image = torch.rand(2, 3, *(side * tokenizer.config.downsampling for side in size)) * 2 - 1
    assert error(graph_module("encode", *tiny_pair, torch.float32)(image), tokenizer.encode(image)) < NOISE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_in_half_precision_have_float32_inputs_and_outputs(tiny_pair: Pair, dtype: torch.dtype) -> None:
    model, tokenizer = tiny_pair
    labels = torch.arange(2, dtype=torch.int32)
    modulation, head, first = split(graph_module("condition", *tiny_pair, dtype)(labels))
    past = [torch.zeros(0, 2, model.config.heads, 64, dtype=dtype)] * 2
    codes = torch.zeros(2, 1, model.config.code_dim)
    step = graph_module("step", *tiny_pair, dtype)
    logits, keys, values = step(codes, first, *modulation, *head, labels, labels, torch.zeros(2), past, past)
    image = graph_module("decode", *tiny_pair, dtype)(torch.zeros(1, 2, 2, dtype=torch.int32))
    latent = graph_module("encode", *tiny_pair, dtype)(image)
    assert {x.dtype for x in (*modulation[0], *head, first, logits, image, latent)} == {torch.float32}
    assert {x.dtype for x in (*keys, *values)} == {dtype}
    assert latent.shape == (1, tokenizer.config.code_dim, 2, 2)


def test_keys_too_small_to_square_in_half_precision_are_normalised(tiny_pair: Pair) -> None:
    """Squares of 1e-5 are 0 in float16, so keys normalised in float16 would be NaN or 1e7 times too long."""
    model = copy.deepcopy(tiny_pair[0])
    for block in model.blocks:
        width = model.config.width
        block.attn.mat_qkv.weight[: 2 * width].mul_(1e-5)
        block.attn.q_bias.mul_(1e-5)
    modulation, head, first = conditioned(model, LABELS)
    past = [torch.zeros(0, 2, model.config.heads, 64, dtype=torch.float16)] * 2
    rows, codes = torch.arange(2, dtype=torch.int32), torch.zeros(2, 1, model.config.code_dim)
    _, keys, _ = Step(model, torch.float16)(codes, first, *modulation, *head, rows, rows, torch.zeros(2), past, past)
    for key in keys:
        assert torch.allclose(key.float().norm(dim=-1), torch.ones(1), atol=2e-3)  # rounding of 64 halves


def test_the_temperature_of_attention_is_capped(tiny_pair: Pair) -> None:
    """The published model uses exp(min(scale_mul, log 100)). exp(50) would make every softmax an argmax."""
    model = copy.deepcopy(tiny_pair[0])
    for block in model.blocks:
        block.attn.scale_mul_1H11.add_(50)
    tokens = [torch.zeros(len(LABELS), h, w, dtype=torch.long) for h, w in SCALES]
    expected = iter_scales(model, LABELS, SCALES, Options(cfg=0), forced=tokens)
    got = step_through(model, LABELS, LABELS, [0.0] * len(SCALES), tokens)
    for (logits, _, _), scale in zip(got, expected, strict=True):
        assert error(logits, scale.logits) < NOISE * 25  # scores are 25 times larger, and so is their noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_group_normalisation_is_computed_in_float32(dtype: torch.dtype) -> None:
    norm = nn.GroupNorm(4, 12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (300 + 100 * torch.randn(2, 12, 5, 7)).to(dtype)  # whose squares overflow float16
    got, expected = Float32GroupNorm(norm)(x), norm.double()(x.double())
    assert got.dtype == dtype and got.shape == x.shape
    rounding = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    assert (got - expected).abs().max() <= rounding * expected.abs().max()


def test_modules_hold_the_weights_in_their_precision_and_leave_the_reference_alone(tiny_pair: Pair) -> None:
    before = {name: value.clone() for part in tiny_pair for name, value in part.state_dict().items()}
    for graph in ("condition", "step", "decode", "encode"):
        module = graph_module(graph, *tiny_pair, torch.float16)
        sizes = {dtype: 0 for dtype in (torch.float16, torch.float32)}
        for value in module.state_dict().values():
            sizes[value.dtype] += value.numel()
        assert sizes[torch.float16] > 0.97 * sum(sizes.values())  # see test_weights_are_of_the_precision
        assert not module.training
    after = {name: value for part in tiny_pair for name, value in part.state_dict().items()}
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)
