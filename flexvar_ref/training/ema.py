"""The moving average of the weights: a value that is updated, saved and loaded, never a module that is switched."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Average = dict[str, Tensor]
M = TypeVar("M", bound=nn.Module)


def start(module: nn.Module) -> Average:
    """The weights as they are, float32."""
    return {name: value.detach().float().clone() for name, value in module.named_parameters()}


def decay_at(step: int, decay: float) -> float:
    """Short at first, so that the average forgets the initial weights: min(decay, (1 + step) / (10 + step))."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(average: Average, module: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · weights, in place."""
    weights = dict(module.named_parameters())
    targets = list(average.values())
    torch._foreach_lerp_(targets, [weights[name].detach().float() for name in average], 1 - decay)


def averaged(module: M, average: Average) -> M:
    """A copy of the module in evaluation mode that holds the average."""
    twin = copy.deepcopy(module).eval().requires_grad_(False)
    with torch.no_grad():
        for name, value in twin.named_parameters():
            value.copy_(average[name])
    return twin
