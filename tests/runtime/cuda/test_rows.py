"""The kernels of `rows.cu` against float64, on a CPU. Results and cache tails begin as NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from host_kernels import HostKernels, device_array
from layer_numbers import Array, Build, Numbers, assert_close, shaped, values

from flexvar_runtime.cuda import layers
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.layers import Branch, LayerConfig


def normed(x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a test: the configuration, sequences and new tokens."""

    config: LayerConfig
    N: int
    L: int


# One warp with idle lanes, several warps, widths of d16 and d24, and more vectors than threads
CASES = [
    Sizes(LayerConfig(half, C, C // S, 8), N, L)
    for half, C, S, N, L in (
        ("float16", 128, 64, 2, 1),
        ("bfloat16", 192, 32, 3, 7),
        ("float16", 1024, 64, 2, 9),
        ("bfloat16", 1536, 64, 1, 4),
        ("float16", 2304, 128, 2, 3),
    )
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.config.half}-{case.config.width}")
def case(request: pytest.FixtureRequest) -> Sizes:
    found: Sizes = request.param
    return found


def modulation(numbers: Numbers, N: int, C: int) -> tuple[DeviceArray, Array]:
    return numbers.normal(N, 1, C, scale=0.3)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("with_branch", [False, True])
def test_modulated_rows(case: Sizes, with_branch: bool, wide: bool, numbers: Numbers, host_kernels: Build) -> None:
    N, L, C = case.N, case.L, case.config.width
    stream, x = numbers.normal(N, L, C, scale=3)
    gamma, g = modulation(numbers, N, C)
    (scale, s), (shift, b) = modulation(numbers, N, C), modulation(numbers, N, C)
    dtype = "float32" if wide else case.config.half
    branch, y = numbers.normal(N, L, C, dtype=dtype)
    result = shaped(numbers.nan(N, L, C, dtype=dtype), N, L, C)
    added = Branch(branch, gamma) if with_branch else None
    host_kernels(case.config).run(layers.modulate_rows(stream, added, scale, shift, result))
    expected = x + y * g if with_branch else x
    assert_close(values(stream), expected, "float32")
    assert_close(values(result), normed(expected) * (1 + s) + b, dtype)


def test_the_epsilon_of_the_rows(numbers: Numbers, host_kernels: Build) -> None:
    """Rows whose variance is as small as the epsilon."""
    stream, x = numbers.normal(2, 3, 128, scale=1e-3)
    zeros = numbers.place(np.zeros((2, 1, 128), np.float32), "float32")
    result = shaped(numbers.nan(2, 3, 128, dtype="float32"), 2, 3, 128)
    host_kernels(CASES[0].config).run(layers.modulate_rows(stream, None, zeros, zeros, result))
    assert_close(values(result), normed(x), "float32")


@pytest.mark.parametrize("guided", [True, False])
def test_guided_rows(case: Sizes, guided: bool, numbers: Numbers, host_kernels: Build) -> None:
    N, L, C, half = 2 * case.N, case.L, case.config.width, case.config.half
    stream, x = numbers.normal(N, L, C)
    (gamma, g), (scale, s), (shift, b) = (modulation(numbers, N, C) for _ in range(3))
    branch, y = numbers.normal(N, L, C, dtype=half)
    t, weights = numbers.normal(case.N)
    cond = np.arange(case.N, dtype=np.int32)[::-1].copy()
    uncond = cond + np.int32(case.N if guided else 0)
    result = shaped(numbers.nan(case.N, L, C, dtype=half), case.N, L, C)
    rows = device_array(cond), device_array(uncond)
    host_kernels(case.config).run(layers.guide_rows(stream, Branch(branch, gamma), scale, shift, rows, t, result))
    z = normed(x + y * g) * (1 + s) + b
    expected = z[cond] + weights[:, None, None] * (z[cond] - z[uncond])
    assert_close(values(result), expected, half)
    assert np.array_equal(values(stream), x)


@pytest.mark.parametrize("wide", [False, True])
def test_split_heads(case: Sizes, wide: bool, numbers: Numbers, host_kernels: Build) -> None:
    N, L, C, H = case.N, case.L, case.config.width, case.config.heads
    S, half = C // H, case.config.half
    dtype = "float32" if wide else half
    joined, x = numbers.normal(N, L, 3 * C, dtype=dtype)
    temperature, t = numbers.normal(H, scale=4)
    queries = shaped(numbers.nan(N, L, C, dtype=dtype), N, L, C)
    # a cache of 5 past, L new and 2 later tokens
    caches = [shaped(numbers.nan(5 + L + 2, N, H, S, dtype=half), 5 + L + 2, N, H, S) for _ in range(2)]
    tails = [cache[5 : 5 + L] for cache in caches]
    host_kernels(case.config).run(layers.split_heads(joined, temperature, queries, *tails))
    q, k, v = (part.reshape(N, L, H, S) for part in np.split(x, 3, -1))
    unit = [part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k)]
    assert_close(values(queries).reshape(N, L, H, S), unit[0] * t[:, None], dtype)
    for cache, expected in zip(caches, (unit[1], v), strict=True):
        got = values(cache)
        assert_close(got[5 : 5 + L], expected.transpose(1, 0, 2, 3), half)
        assert np.isnan(got[:5]).all() and np.isnan(got[5 + L :]).all()


def test_a_head_of_zeros_stays_zero(host_kernels: Build, numbers: Numbers) -> None:
    config = CASES[0].config
    joined = numbers.place(np.zeros((1, 1, 3 * 128), np.float16), "float16")
    queries = shaped(numbers.nan(1, 1, 128, dtype="float16"), 1, 1, 128)
    tails = [shaped(numbers.nan(1, 1, 2, 64, dtype="float16"), 1, 1, 2, 64) for _ in range(2)]
    temperature, _ = numbers.normal(2)
    host_kernels(config).run(layers.split_heads(joined, temperature, queries, *tails))
    assert not any(values(array).any() for array in (queries, *tails))


@pytest.mark.parametrize("rows", [1, 7, 8, 64])
def test_embedded_codes(rows: int, host_kernels: Build, numbers: Numbers) -> None:
    for config in (CASES[0].config, CASES[3].config):
        codes, c = numbers.normal(rows, 8)
        weight, w = numbers.normal(8, config.width)
        offset, o = numbers.normal(rows, config.width)
        stream = shaped(numbers.nan(rows, config.width, dtype="float32"), rows, config.width)
        host_kernels(config).run(layers.embed(codes, weight, offset, stream))
        assert_close(values(stream), c @ w + o, "float32")


def test_class_rows(case: Sizes, host_kernels: Build, numbers: Numbers) -> None:
    C, half = case.config.width, case.config.half
    (embedding, e), (mean, m), (start, s) = numbers.normal(11, C), numbers.normal(C), numbers.normal(1, 1, C)
    labels = np.array([10, 0, 3, 3], np.int32)
    hidden = shaped(numbers.nan(4, C, dtype=half), 4, C)
    first = shaped(numbers.nan(4, 1, C, dtype="float32"), 4, 1, C)
    host_kernels(case.config).run(layers.class_rows(device_array(labels), embedding, mean, start, hidden, first))
    chosen = e[labels]
    assert_close(values(hidden), chosen / (1 + np.exp(-chosen)) - m, half)
    assert_close(values(first)[:, 0], chosen + s[0, 0], "float32")


# --- what the comparisons notice

MUTANTS = [
    ("values[i][k] -= mean;", "", test_modulated_rows),
    ("1.0f + gain[k]", "gain[k]", test_modulated_rows),
    ("added[k] * factor[k]", "added[k]", test_modulated_rows),
    ("blockIdx.x / positions;\n  float values", "blockIdx.x % positions;\n  float values", test_modulated_rows),
    ("weight * (values[i][k] - other[i][k])", "weight * (other[i][k] - values[i][k])", test_guided_rows),
    (
        "(row % positions) * sequences + row / positions",
        "(row / positions) * positions + row % positions",
        test_split_heads,
    ),
    ("key[k] *= key_factor;", "", test_split_heads),
    ("from + 2 * WIDTH + column", "from + WIDTH + column", test_split_heads),
]


@pytest.mark.parametrize(("old", "new", "test"), MUTANTS, ids=[f"{i}" for i in range(len(MUTANTS))])
def test_mutants_of_the_row_kernels_are_noticed(
    old: str, new: str, test: Callable[..., None], host_kernels: Build, numbers: Numbers
) -> None:
    case = CASES[1]
    assert case.config.source.count(old) == 1

    def mutated(config: LayerConfig) -> HostKernels:
        return host_kernels(config, source=config.source.replace(old, new))

    arguments = (True, False) if test is test_modulated_rows else (True,) if test is test_guided_rows else (False,)
    with pytest.raises(AssertionError, match=r"relative error|assert"):
        test(case, *arguments, numbers, mutated)
