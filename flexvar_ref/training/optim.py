"""The optimisers: AdamW as published, or Muon for the blocks' matrices; the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

from .config import Optimisation

UNDECAYED = ("pos_start", "pos_1LC", "class_emb", "scale_mul", "quantizer.embedding")
"""Positions, embeddings and attention temperatures; so are biases and normalisations, which have one dimension."""
REFERENCE_BATCH = 256


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays, and biases, norms, positions, embeddings and scale_mul, which do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim < 2 or name.endswith("bias") or any(part in name for part in UNDECAYED)
            (free if undecayed else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: Optimisation) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=0.0, betas=config.betas)


def optimizer_of(module: nn.Module, config: Optimisation) -> torch.optim.Optimizer:
    """The optimiser the configuration names."""
    return adamw(module, config) if config.algorithm == "adamw" else Muon(module, config)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near 1, five Newton-Schulz steps in their own dtype.

    Source: Jordan et al., "Muon", 2024: the quintic with coefficients 3.4445, −4.7750, 2.0315.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for the matrices inside attention and MLP, AdamW for everything else.

    torch.optim.Muon orthogonalises in bfloat16, which a processor without such instructions emulates, and takes
    matrices only. A matrix n times as tall as wide (q, k, v in one) counts as n square ones. The update has the root
    mean square of an AdamW step (0.2 of the rate), so that one learning rate serves both.
    Source: Jordan et al., 2024; scale: Liu et al., "Muon is scalable for LLM training", 2025.
    """

    def __init__(self, module: nn.Module, config: Optimisation) -> None:
        matrices = {id(p) for name, p in module.named_parameters() if p.requires_grad and _is_hidden_matrix(name, p)}
        groups = []
        for group in parameter_groups(module, config.weight_decay):
            for muon in (True, False):
                chosen = [p for p in group["params"] if (id(p) in matrices) == muon]
                if chosen:
                    groups.append({**group, "params": chosen, "muon": muon})
        super().__init__(groups, {"lr": 0.0, "betas": config.betas, "momentum": config.momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss anew first. torch declares two overloads that differ in it alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal_step if group["muon"] else self._adam_step)(parameters, group)
        return loss

    def _orthogonal_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"])
            rows, columns = update.shape
            parts = rows // columns if rows % columns == 0 else 1
            update = orthogonalised(update.view(parts, rows // parts, columns)).reshape(rows, columns)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(rows // parts, columns)))

    def _adam_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter)
                self.state[parameter] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": torch.tensor(0.0)}
        states = [self.state[parameter] for parameter in parameters]
        adamw_step(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and any(part in name for part in (".attn.", ".ffn."))


def learning_rate(config: Optimisation, step: int, steps: int, batch: int) -> float:
    """The rate of a step: up from 0 over `warmup` steps, then down to final_lr of the peak, lr · batch / 256."""
    peak = config.lr * batch / REFERENCE_BATCH
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    if config.decay != "constant":
        share = config.final_lr + (1 - config.final_lr) * share
    return peak * share


def forget(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Drop what the optimiser remembers of these rows: they hold something new."""
    state = optimizer.state.get(parameter, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][rows] = 0
