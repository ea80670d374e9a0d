"""Guidance and sampling, as plain functions on tensors.

Source: the two guidance rules and the top-k / top-p filter of the published evaluation and demo.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Sides the published evaluation samples; it takes the argmax at any other, and above the training side.
SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})
TRAINED_SIDE = 16
RULES = ("ramp", "constant")


def guidance_weight(
    rule: str, cfg: float, index: int, scales: int, size: tuple[int, int], max_side: int = TRAINED_SIDE
) -> float:
    """t in `cond + t · (cond − uncond)` at scale `index` of `scales`.

    "ramp" (evaluation): cfg · index / min(scales − 1, 9), above cfg from the eleventh scale on; cfg where a side is
    above max_side; 0 for one scale alone.
    "constant" (demo): uncond + cfg · (cond − uncond), hence t = cfg − 1.
    """
    if rule not in RULES:
        raise ValueError(f"got guidance rule {rule!r}; expected one of {', '.join(RULES)}; fix: name one of them")
    if rule == "constant":
        return cfg - 1
    if scales == 1:
        return 0.0
    return cfg if max(size) > max_side else cfg * index / min(scales - 1, 9)


def is_greedy(size: tuple[int, int], max_side: int = TRAINED_SIDE) -> bool:
    """Whether the published evaluation takes the argmax at this (square) scale."""
    h, w = size
    return h == w and (h not in SAMPLED_SIDES or h > max_side)


def probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The distribution (..., V) sampled from.

    top_k keeps the ties at its threshold; top_p then drops the least likely codes while what is dropped stays
    within 1 − top_p, never the most likely one. 0 turns either off.
    """
    vocabulary = logits.shape[-1]
    if 0 < top_k < vocabulary:
        threshold = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probs = logits.double().softmax(-1)
    if 0 < top_p < 1:
        ascending, order = probs.sort(dim=-1, stable=True)
        drop = ascending.cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        probs = probs.masked_fill(drop.scatter(-1, order, drop), 0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-CDF draw in vocabulary order: the first code whose cumulative probability exceeds u."""
    cumulative = probs.cumsum(-1)
    return (cumulative <= uniforms[..., None] * cumulative[..., -1:]).sum(-1)
