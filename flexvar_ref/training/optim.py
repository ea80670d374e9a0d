"""AdamW as published: what decays and what does not, the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

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
