"""The exponential moving average of the weights: float32 tensors by parameter name."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Average = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def start(module: nn.Module) -> Average:
    """An average that starts at the module's weights."""
    return {name: value.detach().float().clone() for name, value in module.named_parameters()}


def decay_at(step: int, decay: float) -> float:
    """The decay at a step: min(decay, (1 + step) / (10 + step)), small at first to forget the initial weights."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(average: Average, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in place."""
    weights = dict(module.named_parameters())
    targets = list(average.values())
    torch._foreach_lerp_(targets, [weights[name].detach().float() for name in average], 1 - decay)


def averaged(module: M, average: Average) -> M:
    """A copy of the module with the averaged weights, in evaluation mode."""
    twin = copy.deepcopy(module).eval().requires_grad_(False)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            value.copy_(average[name])
    return twin
