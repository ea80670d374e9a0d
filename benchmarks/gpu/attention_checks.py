"""Compares the kernels `attention` and `attention_rows` with float64. The cache is NaN around its tokens.

The bounds are those of tests/runtime/cuda/test_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flexvar_runtime.cuda.attention import attention
from flexvar_runtime.cuda.layers import LayerConfig

from .kernel_harness import Array, Check, KernelHarness

BITS = {"float16": 11, "bfloat16": 8, "float32": 24}  # significant bits
AROUND = 2  # tokens of the cache on either side


@dataclass(frozen=True)
class Case:
    """N sequences of L new tokens that attend to T tokens. Scores lie between -spread and spread.

    scales: the number of tokens of each scale in a prefill, whose tokens attend to their own and earlier scales.
    """

    N: int
    L: int
    T: int
    spread: float = 8.0
    wide: bool = False
    scales: tuple[int, ...] = ()


def _prefill(*scales: int, wide: bool = False) -> Case:
    return Case(2, sum(scales), sum(scales), wide=wide, scales=scales)


CASES = (
    Case(2, 1, 1),
    Case(3, 4, 5, spread=100.0),
    Case(2, 9, 14),
    Case(2, 16, 30),
    Case(1, 65, 130, spread=100.0),
    Case(3, 64, 64, spread=0.1),
    Case(2, 9, 130, wide=True),
    _prefill(1, 4, 9, 16, 25),
    _prefill(1, 4, 9, wide=True),
)
LARGE_CASES = (Case(2, 256, 680), Case(3, 169, 424, spread=100.0), _prefill(1, 4, 9, 16, 25, 36, 64, 100))


def attention_checks(harness: KernelHarness, config: LayerConfig, *, small: bool) -> Iterator[Check]:
    """The checks of one configuration. An error is a share of the largest one that is allowed."""
    for case in CASES if small else CASES + LARGE_CASES:
        yield _check(harness, config, case)


def _check(harness: KernelHarness, config: LayerConfig, case: Case) -> Check:
    half, H = config.half, config.heads
    D, (N, L, T) = config.width // H, (case.N, case.L, case.T)
    dtype = "float32" if case.wide else half
    q, exact_q = harness.place(case.spread * _units(harness.rng, N, L, H, D), dtype)
    cached = np.full((2, T + 2 * AROUND, N, H, D), np.nan)
    tokens = slice(AROUND, AROUND + T)
    cached[0, tokens], cached[1, tokens] = _units(harness.rng, T, N, H, D), harness.rng.standard_normal((T, N, H, D))
    placed = [harness.place(part, half) for part in cached]
    keys, values = (array[tokens.start : tokens.stop] for array, _ in placed)
    exact_keys, exact_values = (exact[tokens] for _, exact in placed)
    out = harness.nan(N, L, H * D, dtype=dtype)
    scale_of = np.repeat(np.arange(len(case.scales)), case.scales).astype(np.int32) if case.scales else None
    launch = attention(q, keys, values, out, None if scale_of is None else harness.upload(scale_of))
    harness.launch(launch)
    scores = np.einsum("nlhd,tnhd->nhlt", exact_q, exact_keys, optimize=True)
    if scale_of is not None:
        scores[..., scale_of[None, :] > scale_of[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected, size = (
        np.einsum("nhlt,tnhd->nlhd", weights, part, optimize=True).reshape(N, L, H * D)
        for part in (exact_values, np.abs(exact_values))
    )
    # The result and, on tensor cores, every weight are rounded once. A score has about D roundings of |q| |k|.
    rounding = 2.0 ** -BITS[dtype] + (2.0 ** -BITS[half] if launch.name == "attention" else 0.0)
    allowed = size * (rounding + D * case.spread * 2.0**-24) + 1e-6
    form = " masked" if case.scales else ""
    error = float(np.max(np.abs(harness.values(out) - expected) / allowed))
    return Check(f"{launch.name} {N}x{L} of {T} tokens, spread {case.spread:g},{form} in {dtype}", error, 1)


def _units(rng: np.random.Generator, *shape: int) -> Array:
    values = rng.standard_normal(shape)
    units: Array = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return units
