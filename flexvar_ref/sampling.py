"""Guidance and sampling as functions on tensors.

Source: the two guidance rules and the top-k and top-p filter of the published evaluation and demo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InvalidInput

# The published evaluation samples at these sides only. At any other side, and above the training side, it takes the
# argmax.
SAMPLED_SIDES = frozenset({1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 23, 24, 32})
TRAINED_SIDE = 16
RULES = ("ramp", "constant")


def guidance_weight(
    rule: str, cfg: float, index: int, scales: int, size: tuple[int, int], max_side: int = TRAINED_SIDE
) -> float:
    """The weight t of guidance in `cond + t · (cond − uncond)` at scale `index` of `scales`.

    "ramp" (the published evaluation): t = cfg · index / min(scales − 1, 9), which exceeds cfg from the eleventh scale
    on. t = cfg where a side is above max_side, and t = 0 for a schedule of one scale.
    "constant" (the published demo): uncond + cfg · (cond − uncond), so t = cfg − 1.
    Raises InvalidInput for any other rule.
    """
    if rule not in RULES:
        names = ", ".join(RULES)
        raise InvalidInput(
            f"The guidance rule is {rule!r}, but it must be one of {names}.",
            expected=f"one of {names}",
            fix="Pass one of them.",
        )
    if rule == "constant":
        return cfg - 1
    if scales == 1:
        return 0.0
    return cfg if max(size) > max_side else cfg * index / min(scales - 1, 9)


def is_greedy(size: tuple[int, int], max_side: int = TRAINED_SIDE) -> bool:
    """Whether the published evaluation takes the argmax at this scale. It knows square scales only."""
    h, w = size
    return h == w and (h not in SAMPLED_SIDES or h > max_side)


def probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The distribution (..., V) that tokens are drawn from, float64, for logits (..., V).

    top_k keeps the most likely codes, and ties at the threshold are kept too. top_p then drops the least likely codes
    while their total probability is at most 1 − top_p. The most likely code is never dropped. 0 turns either off.
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
    """Tokens (...) drawn from distributions (..., V) with uniforms (...) in [0, 1), by inverse CDF in vocabulary order.

    Each token is the first code whose cumulative probability exceeds its uniform.
    """
    cumulative = probs.cumsum(-1)
    return (cumulative <= uniforms[..., None] * cumulative[..., -1:]).sum(-1)
