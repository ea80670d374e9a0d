"""The parts of the transformer against formulas written out here, and independence of scales and images."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flexvar_ref import FlexVAR, Tokenizer, TransformerConfig, as_scales, block_causal_mask
from flexvar_ref.errors import InvalidInput
from flexvar_ref.transformer import LOGIT_SCALE_LIMIT, Block, HeadModulation, SelfAttention, resize_codes

Pair = tuple[FlexVAR, Tokenizer]
RandomTokens = Callable[..., list[torch.Tensor]]
NOISE = 1e-4  # float32 noise on logits of standard deviation 4, from sums in another order
SCALES = as_scales("1_2_3x2_4")


@pytest.fixture
def model(tiny: Pair) -> FlexVAR:
    return copy.deepcopy(tiny[0])


def test_block_causal_mask_by_hand() -> None:
    rows = ["10000", "11100", "11100", "11111", "11111"]
    expected = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(block_causal_mask(as_scales("1_1x2_2x1")), expected)


def test_positions_at_the_side_of_the_table_are_the_table(model: FlexVAR) -> None:
    assert torch.equal(model.positions(32, 32), model.pos_1LC[0].flatten(1).T)


def test_positions_above_the_table_repeat_it(model: FlexVAR) -> None:
    table_hwC = model.pos_1LC[0].permute(1, 2, 0)
    repeated = table_hwC.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(model.positions(64, 64), repeated.flatten(0, 1))


def test_positions_are_means_of_the_table(model: FlexVAR) -> None:
    """Cell i of n covers the table from floor(32 i / n) to ceil(32 (i + 1) / n), also for n above 32."""
    table_hwC = model.pos_1LC[0].permute(1, 2, 0)

    def span(i: int, n: int) -> slice:
        return slice(32 * i // n, -(-32 * (i + 1) // n))

    for h, w in ((1, 1), (3, 5), (12, 20), (13, 13), (1, 40), (23, 48)):
        expected = torch.stack([table_hwC[span(i, h), span(j, w)].mean((0, 1)) for i in range(h) for j in range(w)])
        torch.testing.assert_close(model.positions(h, w), expected)


def cubic(size: int, target: int) -> torch.Tensor:
    """(target, size) matrix of a bicubic resize with a = −0.75, half-pixel centres and clamped borders."""
    a, matrix = -0.75, torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * size / target - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), size - 1)] += inner if d <= 1 else outer
    return matrix


@pytest.mark.parametrize(("size", "target"), [((1, 1), (2, 3)), ((2, 3), (5, 4)), ((6, 4), (3, 9)), ((5, 5), (5, 5))])
def test_codes_are_resized_bicubically(size: tuple[int, int], target: tuple[int, int]) -> None:
    codes = torch.randn(2, *size, 8)
    rows, columns = cubic(size[0], target[0]), cubic(size[1], target[1])
    expected = torch.einsum("ih,bhwd,jw->bijd", rows, codes.double(), columns)
    torch.testing.assert_close(resize_codes(codes, target).double(), expected, atol=1e-5, rtol=0)


def test_resized_codes_are_not_normalised_again(model: FlexVAR, random_tokens: RandomTokens) -> None:
    [tokens] = random_tokens(as_scales([2]), 1, 512)
    norms = model.next_codes(tokens, (2, 2), (3, 5)).norm(dim=-1)
    assert norms.min() < 0.9


def test_the_input_of_the_first_scale_is_the_class(model: FlexVAR) -> None:
    x = model.first_input(torch.tensor([3]))
    mean = model.pos_1LC[0].mean((1, 2))
    torch.testing.assert_close(x[0, 0], model.class_emb.weight[3] + model.pos_start[0, 0] + mean)


@pytest.mark.parametrize("learned", [0.5, 4.0, LOGIT_SCALE_LIMIT + 3.0])
def test_attention_by_hand(learned: float) -> None:
    """Queries and keys have unit length. The only scale is exp of the learned temperature, at most 100."""
    attention = SelfAttention(TransformerConfig(depth=1, heads=2, head_size=4))
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(attention.scale_mul_1H11, learned)
    x = torch.randn(1, 5, 8)
    qkv = x[0] @ attention.mat_qkv.weight.T
    q, k, v = qkv[:, :8] + attention.q_bias, qkv[:, 8:16], qkv[:, 16:] + attention.v_bias
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        cosine = (q[:, head] / q[:, head].norm(dim=-1, keepdim=True)) @ (
            k[:, head] / k[:, head].norm(dim=-1, keepdim=True)
        ).T
        heads.append((cosine * min(math.exp(learned), 100.0)).softmax(-1) @ v[:, head])
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, None, None)[0][0], expected, atol=1e-4, rtol=1e-4)


def test_block_by_hand() -> None:
    """The modulation is split in the order gamma1, gamma2, scale1, scale2, shift1, shift2. GELU has its tanh form."""
    config = TransformerConfig(depth=1, heads=2, head_size=4)
    block = Block(config, drop_path=0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x, cond = torch.randn(1, 5, 8), torch.randn(1, 8)
    parts = (F.silu(cond) @ block.ada_lin[1].weight.T + block.ada_lin[1].bias)[0].split(8)
    gamma1, gamma2, scale1, scale2, shift1, shift2 = parts

    def norm(v: torch.Tensor) -> torch.Tensor:
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    y = x + block.attn(norm(x) * (1 + scale1) + shift1, None, None)[0] * gamma1
    hidden = (norm(y) * (1 + scale2) + shift2) @ block.ffn.fc1.weight.T + block.ffn.fc1.bias
    hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    expected = y + (hidden @ block.ffn.fc2.weight.T + block.ffn.fc2.bias) * gamma2
    torch.testing.assert_close(block(x, cond)[0], expected, atol=1e-4, rtol=1e-5)

    head = HeadModulation(config)
    scale, shift = head.ada_lin(cond)[0].split(8)
    torch.testing.assert_close(head(x, cond), norm(x) * (1 + scale) + shift)


def test_a_temperature_above_its_clamp_changes_nothing(model: FlexVAR, random_tokens: RandomTokens) -> None:
    tokens = random_tokens(SCALES, 1, 512)
    logits = []
    for value in (LOGIT_SCALE_LIMIT, LOGIT_SCALE_LIMIT + 5):
        for block in model.blocks:
            torch.nn.init.constant_(block.attn.scale_mul_1H11, value)
        with torch.inference_mode():
            logits.append(model([1], tokens, SCALES))
    assert torch.equal(*logits)


def test_later_scales_do_not_reach_back(model: FlexVAR, random_tokens: RandomTokens) -> None:
    tokens = random_tokens(SCALES, 1, 512)
    with torch.inference_mode():
        before = model([1], tokens, SCALES)
        tokens[2] = (tokens[2] + 7) % 512
        after = model([1], tokens, SCALES)
        shorter = model([1], tokens[:2], SCALES[:3])
    own = 1 + 4 + 6  # tokens of a scale are fed to the next one only
    torch.testing.assert_close(after[:, :own], before[:, :own], atol=NOISE, rtol=0)
    assert (after[:, own:] - before[:, own:]).abs().max() > 0.1
    torch.testing.assert_close(shorter, before[:, :own], atol=NOISE, rtol=0)


def test_the_last_tokens_are_not_needed(model: FlexVAR, random_tokens: RandomTokens) -> None:
    tokens = random_tokens(SCALES, 2, 512)
    flat = [scale.flatten(1).int() for scale in tokens]
    with torch.inference_mode():
        assert torch.equal(model([1, 2], tokens, SCALES), model([1, 2], flat[:-1], "1_2_3x2_4"))


def test_batch_position_does_not_matter(model: FlexVAR, random_tokens: RandomTokens) -> None:
    tokens = random_tokens(SCALES, 3, 512)
    labels = torch.tensor([1, 10, 7])
    order = torch.tensor([2, 0, 1])
    with torch.inference_mode():
        logits = model(labels, tokens, SCALES)
        permuted = model(labels[order], [scale[order] for scale in tokens], SCALES)
        alone = model(labels[1:2], [scale[1:2] for scale in tokens], SCALES)
    torch.testing.assert_close(permuted, logits[order], atol=NOISE, rtol=0)
    torch.testing.assert_close(alone, logits[1:2], atol=NOISE, rtol=0)


def test_evaluation_is_deterministic(model: FlexVAR, random_tokens: RandomTokens) -> None:
    tokens = random_tokens(SCALES, 2, 512)
    with torch.inference_mode():
        assert torch.equal(model([1, 2], tokens, SCALES), model([1, 2], tokens, SCALES))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokens_per_scale": [torch.zeros(2, 1, 1)]}, r"tokens_per_scale .* 1 .* 3"),
        ({"tokens_per_scale": [torch.zeros(2, 1, 1), torch.zeros(2, 3, 2)]}, r"2x3 .*\(2, 3, 2\).*\(2, 2, 3\)"),
        ({"labels_B": [1]}, r"1x1 .*\(2, 1, 1\).*\(1, 1, 1\)"),
        ({"scales": "2_3_4"}, r"schedule .*2x2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(model: FlexVAR, change: dict[str, Any], fault: str) -> None:
    fitting = {
        "labels_B": [1, 2],
        "tokens_per_scale": [torch.zeros(2, 1, 1), torch.zeros(2, 2, 3)],
        "scales": "1_2x3_4",
    }
    with pytest.raises(InvalidInput, match=fault):
        model(**{**fitting, **change})


def test_tokens_beyond_the_codebook_are_refused(model: FlexVAR) -> None:
    for token in (-1, 512):
        with pytest.raises(IndexError):
            model([1], [torch.tensor([[[token]]])], "1_2")


def test_another_codebook_is_refused(model: FlexVAR) -> None:
    with pytest.raises(InvalidInput, match=r"codebook .*\(8, 3\).*\(512, 8\)"):
        FlexVAR(model.config, torch.zeros(8, 3))


def test_the_codebook_is_not_a_parameter(tiny: Pair) -> None:
    model, tokenizer = tiny
    assert "codebook_VD" not in model.state_dict()
    norms = F.normalize(tokenizer.quantizer.embedding.weight, dim=-1)
    torch.testing.assert_close(model.codebook_VD, norms)
