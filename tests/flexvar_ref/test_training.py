"""The networks can be trained: gradients, initialisation, dropout in training mode only, a loss that falls."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from flexvar_ref import FlexVAR, Tokenizer, as_scales
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer

Pair = tuple[FlexVAR, Tokenizer]
RandomTokens = Callable[..., list[torch.Tensor]]
SCALES = as_scales("1_2_3x2")
VOCABULARY = TINY_TOKENIZER.vocabulary


def fresh(tokenizer: Tokenizer, label_dropout: float = 0.0, drop_path: float = 0.0, depth: int = 2) -> FlexVAR:
    """A transformer with the published initialisation."""
    config = dataclasses.replace(tiny_transformer(depth), label_dropout=label_dropout, drop_path=drop_path)
    return FlexVAR(config, tokenizer.codebook_VD)


def loss_of(model: FlexVAR, labels: list[int], tokens: list[torch.Tensor]) -> torch.Tensor:
    target = torch.cat([scale.flatten(1) for scale in tokens], dim=1)
    return F.cross_entropy(model(labels, tokens, SCALES).flatten(0, 1), target.flatten())


def test_gradients_reach_every_parameter(tiny: Pair, random_tokens: RandomTokens) -> None:
    model = copy.deepcopy(tiny[0]).train()
    loss_of(model, [1, 2], random_tokens(SCALES, 2, VOCABULARY)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    used = model.class_emb.weight.grad.abs().amax(1) > 0
    assert {i for i in range(11) if used[i]} <= {1, 2, 10}  # the labels, and "no class" for a dropped one
    assert "codebook_VD" not in dict(model.named_parameters())


def test_gradients_agree_with_finite_differences(tiny: Pair, random_tokens: RandomTokens) -> None:
    """In float64, along one random direction of all parameters."""
    model = fresh(tiny[1]).double()
    tokens = random_tokens(SCALES, 2, VOCABULARY)
    loss_of(model, [1, 2], tokens).backward()
    directions = [torch.randn_like(p) * p.std().nan_to_num(1.0) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True))
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(sign * step * d)
            losses.append(loss_of(model, [1, 2], tokens))
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-5, atol=1e-8)


def test_the_initial_loss_is_log_vocabulary(tiny: Pair, random_tokens: RandomTokens) -> None:
    model = fresh(tiny[1], label_dropout=0.1, drop_path=0.1)
    with torch.no_grad():
        loss = loss_of(model, [1, 2], random_tokens(SCALES, 2, VOCABULARY)).item()
    assert loss == pytest.approx(math.log(VOCABULARY), abs=0.02)


def test_published_initialisation(tiny: Pair) -> None:
    model = fresh(tiny[1], depth=3)
    C = model.config.width
    std = math.sqrt(1 / (3 * C))
    block = model.blocks[1]
    expected = {
        model.class_emb.weight: 1.0,
        model.pos_1LC: 1.0,
        model.word_embed.weight: 1.0,
        model.head.weight: 0.02,
        model.head_nm.ada_lin[1].weight: 0.5,
        block.ada_lin[1].weight[: 2 * C]: 1e-5,
        block.ada_lin[1].weight[2 * C :]: 0.5,
        block.attn.mat_qkv.weight: 1.0,
        block.attn.proj.weight: 1 / math.sqrt(6),
        block.ffn.fc1.weight: 1.0,
        block.ffn.fc2.weight: 1 / math.sqrt(6),
    }
    for weight, factor in expected.items():
        assert weight.std().item() == pytest.approx(std * factor, rel=0.05)  # each has at least 1,536 values
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases and not any(p.any() for p in biases)
    assert block.attn.scale_mul_1H11.exp().flatten().tolist() == pytest.approx([4.0] * 3)


def test_labels_drop_in_training_only(tiny: Pair, random_tokens: RandomTokens) -> None:
    config = dataclasses.replace(tiny[0].config, label_dropout=0.5, drop_path=0.0)
    model = FlexVAR(config, tiny[1].codebook_VD)
    model.load_state_dict(tiny[0].state_dict())
    batch = 200
    tokens = [scale.expand(batch, -1, -1) for scale in random_tokens(SCALES, 1, VOCABULARY)]
    with torch.no_grad():
        kept, null = (model.eval()([label] * batch, tokens, SCALES)[:, 0] for label in (1, config.null_class))
        logits = model.train()([1] * batch, tokens, SCALES)[:, 0]
    is_kept = torch.isclose(logits, kept, atol=1e-4).all(-1)
    is_null = torch.isclose(logits, null, atol=1e-4).all(-1)
    assert torch.equal(is_kept, ~is_null)
    assert 60 < is_null.sum() < 140  # 5.6 standard deviations


def test_paths_drop_in_training_only(tiny: Pair, random_tokens: RandomTokens) -> None:
    config = dataclasses.replace(tiny[0].config, label_dropout=0.0, drop_path=0.5)
    model = FlexVAR(config, tiny[1].codebook_VD)
    model.load_state_dict(tiny[0].state_dict())
    assert [block.drop_path for block in model.blocks] == [0.0, 0.5]  # grows with the block
    batch = 200
    tokens = [scale.expand(batch, -1, -1) for scale in random_tokens(SCALES, 1, VOCABULARY)]
    with torch.no_grad():
        still = model.eval()([1] * batch, tokens, SCALES)
        moving = model.train()([1] * batch, tokens, SCALES)
    torch.testing.assert_close(still, tiny[0]([1] * batch, tokens, SCALES))
    # attention and MLP of the last block are each dropped or doubled for a whole image: four outcomes
    outcomes: list[torch.Tensor] = []
    for logits in moving:
        if not any(torch.allclose(logits, known, atol=1e-3) for known in outcomes):
            outcomes.append(logits)
    assert len(outcomes) == 4
    assert not torch.isclose(moving, still, atol=1e-2).flatten(1).all(-1).any()


def test_a_dropped_path_keeps_its_mean() -> None:
    model = FlexVAR(dataclasses.replace(tiny_transformer(), drop_path=0.3), torch.zeros(512, 8)).train()
    dropped = model.blocks[-1]._drop(torch.ones(20000, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)  # 6 standard deviations


def test_two_samples_are_learnt(tiny: Pair, random_tokens: RandomTokens) -> None:
    model = fresh(tiny[1]).train()
    tokens = random_tokens(SCALES, 2, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for _ in range(30):
        loss = loss_of(model, [1, 2], tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_tokenizer_is_differentiable(tiny: Pair) -> None:
    tokenizer = copy.deepcopy(tiny[1]).train()
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    codes = F.normalize(tokenizer.encode(image), dim=1).permute(0, 2, 3, 1)
    codebook_pull = (codes - tokenizer.codebook_VD[tokenizer.nearest(codes.permute(0, 3, 1, 2))]).square().mean()
    (F.mse_loss(tokenizer.decode_codes(codes), image) + codebook_pull).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
