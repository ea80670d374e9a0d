"""The arithmetic a generation cannot avoid, and what this machine's processor does at best."""

from __future__ import annotations

import time

import numpy as np

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.manifest import ModelFacts

PUBLISHED_DECODER_FLOPS = 252.7e9  # the published tokenizer's decoder at 16 x 16 tokens
PUBLISHED_DECODER_TOKENS = 256


def transformer_flops(model: ModelFacts, schedule: ScaleSchedule, *, guided: bool) -> float:
    """Multiply-adds counted as two, for one image: blocks on every branch, the head once, the condition left out."""
    branches, flops, past = (2 if guided else 1), 0.0, 0
    for h, w in schedule:
        new = h * w
        past += new
        products = 2 * 12 * model.width**2 * new  # q, k, v, projection and the MLP of width 4C
        attention = 4 * model.width * new * past
        flops += branches * model.depth * (products + attention) + 2 * model.width * model.vocabulary * new
    return flops


def decoder_flops(schedule: ScaleSchedule) -> float:
    """Of the published tokenizer, for one image: convolutions grow with the number of tokens."""
    return PUBLISHED_DECODER_FLOPS * schedule[-1][0] * schedule[-1][1] / PUBLISHED_DECODER_TOKENS


def measured_flops_per_second(seconds: float = 1.0, side: int = 2048) -> float:
    """Best rate of a float32 matrix product over `seconds`: NumPy's BLAS, all of its threads."""
    a = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    b, best, end = a.copy(), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
