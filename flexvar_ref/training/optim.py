"""The optimisers (AdamW as published, and Muon) and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step

from .config import Optimisation

UNDECAYED = ("pos_start", "pos_1LC", "class_emb", "scale_mul", "quantizer.embedding")
"""Parts of the names of matrices without weight decay: positions, embeddings and attention temperatures."""
REFERENCE_BATCH = 256  # images; optim.lr is the rate for a batch of this size


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay.

    Biases, normalisations, positions, embeddings and scale_mul have none.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            undecayed = parameter.ndim < 2 or name.endswith("bias") or any(part in name for part in UNDECAYED)
            (free if undecayed else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, config: Optimisation) -> torch.optim.AdamW:
    """AdamW with the published parameter groups. The learning rate is set at every step."""
    return torch.optim.AdamW(parameter_groups(module, config.weight_decay), lr=0.0, betas=config.betas)


def optimizer_of(module: nn.Module, config: Optimisation) -> torch.optim.Optimizer:
    """The optimiser that the configuration names."""
    return adamw(module, config) if config.algorithm == "adamw" else Muon(module, config)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices (N, R, C) with singular values near 1, by five Newton-Schulz steps in the dtype of the input.

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
    """Orthogonalised momentum for the matrices inside attention and MLP, AdamW for all other parameters.

    A matrix n times as tall as wide (q, k and v in one) is treated as n square matrices. The update is scaled to the
    root mean square of an AdamW step (0.2 times the rate), so that both use one learning rate.
    torch.optim.Muon is not used: it accepts matrices only, and it orthogonalises in bfloat16, which is slow on CPUs
    without bfloat16 instructions.
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
        """Take one step. closure: recomputes the loss before the step. Returns the loss of the closure, or None."""
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
    """The learning rate of a step. The peak is lr · batch / 256.

    It rises to the peak over `warmup` steps, then falls to final_lr times the peak.
    """
    peak = config.lr * batch / REFERENCE_BATCH
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    if config.decay != "constant":
        share = config.final_lr + (1 - config.final_lr) * share
    return peak * share


def reset_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Set the optimiser's moments of some rows of a parameter to 0, because the rows were replaced."""
    state = optimizer.state.get(parameter, {})
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name][rows] = 0
