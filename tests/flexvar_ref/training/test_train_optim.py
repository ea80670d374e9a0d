"""Optimisers, learning rate, averaged weights, and the order of the data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.errors import ConfigError
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer
from flexvar_ref.training import ema
from flexvar_ref.training.config import Optimisation
from flexvar_ref.training.feed import BatchPlan, CachedSource, DatasetSource, batches, signed
from flexvar_ref.training.optim import (
    Muon,
    adamw,
    learning_rate,
    optimizer_of,
    orthogonalised,
    parameter_groups,
    reset_moments,
)


def test_groups_with_and_without_weight_decay() -> None:
    model = FlexVAR(tiny_transformer(), torch.randn(512, 8))
    optimizer = adamw(model, Optimisation(weight_decay=0.05))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert decayed["betas"] == (0.9, 0.95)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for p in decayed["params"]}
    dropped = {names[id(p)] for p in free["params"]}
    assert kept | dropped == set(names.values()) and not kept & dropped
    assert {"word_embed.weight", "head.weight", "blocks.0.attn.mat_qkv.weight", "blocks.1.ada_lin.1.weight"} <= kept
    assert {
        "pos_1LC",
        "pos_start",
        "class_emb.weight",
        "blocks.0.attn.scale_mul_1H11",
        "blocks.0.attn.q_bias",
    } <= dropped
    assert all(name.endswith("weight") for name in kept)
    tokenizer = Tokenizer(TINY_TOKENIZER)
    groups = adamw(tokenizer, Optimisation()).param_groups
    assert any(p is tokenizer.quantizer.embedding.weight for p in groups[1]["params"])
    assert all(p.ndim > 1 for p in groups[0]["params"])


MUON = Optimisation(algorithm="muon", weight_decay=0.0)


def muon_and_model() -> tuple[Muon, FlexVAR]:
    torch.manual_seed(0)
    model = FlexVAR(tiny_transformer(), torch.randn(512, 8))
    optimizer = optimizer_of(model, MUON)
    assert isinstance(optimizer, Muon)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer, model


def with_gradients(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 16, 64), (3, 64, 16)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, int, int]) -> None:
    """The quintic is applied five times to every singular value. Those that are not tiny come near 1."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / matrices.norm(dim=(1, 2))[:, None]
    large = values > 0.02
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalised(matrices), left @ (values[..., None] * right), rtol=0, atol=1e-4)
    assert values[large].min() > 0.6 and values.max() < 1.25 and large.float().mean() > 0.9


def test_muon_takes_the_matrices_of_attention_and_mlp_and_adamw_the_rest() -> None:
    optimizer, model = muon_and_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(taken) == sorted(names.values())  # each once
    hidden = {names[id(p)] for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    layers = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    assert hidden == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert isinstance(optimizer_of(model, Optimisation()), torch.optim.AdamW)


def test_a_muon_step_orthogonalises_q_k_and_v_apart_at_the_scale_of_adamw() -> None:
    optimizer, model = muon_and_model()
    weight = model.blocks[0].attn.mat_qkv.weight
    before, width = weight.detach().clone(), model.config.width
    with_gradients(model, 1)
    gradient = weight.grad
    assert gradient is not None
    optimizer.step()
    change = before - weight.detach()
    momentum = gradient * (1 - MUON.momentum)
    direction = gradient.lerp(momentum, MUON.momentum)
    for part in range(3):
        rows = slice(part * width, (part + 1) * width)
        expected = 0.01 * 0.2 * width**0.5 * orthogonalised(direction[None, rows])[0]
        torch.testing.assert_close(change[rows], expected, rtol=1e-3, atol=1e-7)
    assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.3)


def test_muon_updates_the_other_parameters_like_adamw() -> None:
    (optimizer, model), (_, twin) = muon_and_model(), muon_and_model()
    plain = torch.optim.AdamW(parameter_groups(twin, 0.0), lr=0.01, betas=MUON.betas)
    for seed in range(3):
        for one in (model, twin):
            with_gradients(one, seed)
        optimizer.step()
        plain.step()
    others = dict(twin.named_parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(name for name, p in model.named_parameters() if p is parameter)
            assert torch.equal(parameter, others[name]) != group["muon"], name


def test_a_resumed_muon_takes_the_same_steps() -> None:
    (whole, model), (stopped, twin) = muon_and_model(), muon_and_model()
    for seed in range(4):
        with_gradients(model, seed)
        whole.step()
    for seed in range(2):
        with_gradients(twin, seed)
        stopped.step()
    state = copy.deepcopy(stopped.state_dict())
    resumed = optimizer_of(twin, MUON)
    resumed.load_state_dict(state)
    for seed in range(2, 4):
        with_gradients(twin, seed)
        resumed.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_closure_recomputes_the_loss() -> None:
    optimizer, model = muon_and_model()
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> float:
        assert torch.is_grad_enabled()
        with_gradients(model, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0 and optimizer.step() is None
    assert all(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_the_learning_rate_rises_and_falls() -> None:
    config = Optimisation(lr=1e-3, warmup=10, decay="cosine", final_lr=0.1)
    rates = [learning_rate(config, step, 110, batch=64) for step in range(111)]
    peak = 1e-3 * 64 / 256
    assert rates[0] == pytest.approx(peak / 10) and rates[9] == rates[10] == pytest.approx(peak)
    assert rates[60] == pytest.approx(peak * 0.55) and rates[110] == pytest.approx(peak * 0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    linear = Optimisation(lr=1e-3, warmup=0, decay="linear", final_lr=0.0)
    assert learning_rate(linear, 50, 100, 256) == pytest.approx(5e-4)
    constant = Optimisation(lr=1e-3, warmup=0, decay="constant")
    assert learning_rate(constant, 99, 100, 256) == pytest.approx(1e-3)


def test_moments_of_rows_are_reset() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    reset_moments(optimizer, weight, torch.tensor([0]))  # there are no moments yet
    weight.sum().backward()
    optimizer.step()
    reset_moments(optimizer, weight, torch.tensor([1]))
    state = optimizer.state[weight]
    assert state["exp_avg"].any(1).tolist() == state["exp_avg_sq"].any(1).tolist() == [True, False, True]


def test_the_average_of_the_weights() -> None:
    layer = torch.nn.Linear(2, 1)
    average = ema.start(layer)
    before = copy.deepcopy(average)
    with torch.no_grad():
        layer.weight.add_(1)
    ema.update(average, layer, 0.9)
    torch.testing.assert_close(average["weight"], before["weight"] + 0.1)
    torch.testing.assert_close(average["bias"], before["bias"])
    twin = ema.averaged(layer, average)
    assert torch.equal(twin.weight, average["weight"]) and not twin.training and layer.training
    assert not torch.equal(twin.weight, layer.weight)
    assert ema.decay_at(0, 0.999) == pytest.approx(0.1) and ema.decay_at(10**6, 0.999) == 0.999
    ema.update(average, layer, ema.decay_at(0, 0.0))  # decay 0: the weights themselves
    assert torch.equal(average["weight"], layer.weight)


class Counting:
    """Sample i shows i."""

    classes = ("even", "odd")
    length = None

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((3, 2, 2), index, np.float32), index % 2


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_any_division_of_a_step_sees_the_same_samples(processes: int, accumulation: int) -> None:
    plans = [BatchPlan(8, processes, rank, accumulation) for rank in range(processes)]
    seen = {plan.chunk(turn): plan.indices(3, turn).tolist() for plan in plans for turn in range(accumulation)}
    assert [i for chunk in sorted(seen) for i in seen[chunk]] == list(range(24, 32))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loop\.batch is 8.* 3"):
        BatchPlan(8, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_start_at_any_step(workers: int) -> None:
    plan = BatchPlan(4, accumulation=2)
    stream = batches(DatasetSource(Counting()), plan, 5, workers)
    drawn = [next(stream) for _ in range(3)]
    assert [values[:, 0, 0, 0].tolist() for values, _ in drawn] == [[20, 21], [22, 23], [24, 25]]
    assert [labels.tolist() for _, labels in drawn] == [[0, 1]] * 3
    del stream


def test_cached_samples_come_in_a_new_order_every_epoch() -> None:
    cached = CachedSource(np.arange(10), np.arange(10) % 2, seed=0)
    epochs = [cached.take(np.arange(start, start + 10))[0].tolist() for start in (0, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1] != list(range(10))
    across = cached.take(np.arange(8, 12))[0].tolist()
    assert across == epochs[0][8:] + epochs[1][:2]


def test_pixels_become_signed_images() -> None:
    pixels = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    assert signed(pixels)[0, :, 0, 0].tolist() == pytest.approx([-1, -1 / 255, 1])
    assert signed(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4, 4)
