"""The kernels of `rows.cu` and `maps.cu` against float64, on a CPU. Results and cache tails begin as NaN."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from host_kernels import HostKernels, device_array
from numpy.typing import NDArray

from flexvar_runtime.backends.cuda.parameters import Parameter, round_to
from flexvar_runtime.cuda import layers
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.compilation import compile_source
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.cuda.layers import Branch, LayerConfig
from flexvar_runtime.errors import BackendUnavailable

Build = Callable[..., HostKernels]
Array = NDArray[Any]
ERROR = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 3e-6}  # of one rounding, and of sums in float32
HALVES = ("float16", "bfloat16")


class Numbers:
    """Random arrays, and arrays on the emulated device with guards that must not change."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self._guarded: list[tuple[NDArray[np.uint8], int]] = []

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> tuple[DeviceArray, Array]:
        """An array on the device and its values in float64."""
        stored = round_to(self.rng.standard_normal(shape) * scale, dtype)
        return self.place(stored, dtype), Parameter(stored, dtype).float32().astype(np.float64)

    def place(self, stored: Array, dtype: str) -> DeviceArray:
        memory = np.full(stored.nbytes + 544, 0xAB, np.uint8)
        start = -memory.ctypes.data % 256 + 256
        part = memory[start : start + stored.nbytes]
        part[:] = stored.reshape(-1).view(np.uint8)
        self._guarded.append((memory[start + stored.nbytes :], start))
        self._guarded.append((memory[:start], start))
        return DeviceArray(part.ctypes.data, stored.shape, dtype, memory)

    def nan(self, *shape: int, dtype: str) -> DeviceArray:
        size = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
        return self.place(np.full(size, 0xFF, np.uint8).view(np.uint16 if dtype != "float32" else np.float32), dtype)

    def check_guards(self) -> None:
        assert all((guard == 0xAB).all() for guard, _ in self._guarded), "a kernel wrote outside its array"


def values(array: DeviceArray, *shape: int) -> Array:
    """The numbers of an array on the emulated device, as float64."""
    start = array.address - array.memory.ctypes.data
    stored = array.memory[start : start + array.nbytes]
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[array.dtype]
    return Parameter(stored.view(kind).reshape(shape or array.shape), array.dtype).float32().astype(np.float64)


def shaped(array: DeviceArray, *shape: int) -> DeviceArray:
    return DeviceArray(array.address, shape, array.dtype, array.memory)


@pytest.fixture
def numbers() -> Any:
    made = Numbers()
    yield made
    made.check_guards()


def assert_close(got: Array, expected: Array, dtype: str) -> None:
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < ERROR[dtype], f"relative error {error:.2g}"


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


# --- maps

MAPS = [
    (1, 1, 1, 8, 1),
    (2, 3, 5, 32, 32),
    (3, 16, 16, 64, 32),
    (1, 24, 20, 128, 32),
    (2, 4, 4, 512, 32),
    (1, 2, 3, 2048, 64),
]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("B", "H", "W", "C", "groups"), MAPS)
def test_group_norms(
    half: str, B: int, H: int, W: int, C: int, groups: int, host_kernels: Build, numbers: Numbers
) -> None:
    config = LayerConfig(half, 128, 2, 8)
    host = host_kernels(config)
    finished = np.zeros(B, np.uint32)
    for wide, silu in ((False, True), (True, False)):
        stored = round_to(numbers.rng.standard_normal((B, H, W, C)) + 2, "float32" if wide else half)
        dtype = "float32" if wide else half
        x, exact = numbers.place(stored, dtype), Parameter(stored, dtype).float32().astype(np.float64)
        (gain, g), (bias, b) = numbers.normal(C), numbers.normal(C)
        partial = shaped(numbers.nan(B, layers.MOST_CHUNKS, groups, 2, dtype="float32"), B, 256, groups, 2)
        statistics = shaped(numbers.nan(B, groups, 2, dtype="float32"), B, groups, 2)
        y = shaped(numbers.nan(B, H, W, C, dtype=half), B, H, W, C)
        host.run(layers.group_statistics(x, partial, device_array(finished), statistics))
        host.run(layers.group_normalise(x, statistics, gain, bias, y, silu=silu))
        grouped = exact.reshape(B, H * W, groups, C // groups)
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(B, H, W, C) * g + b
        expected = expected / (1 + np.exp(-expected)) if silu else expected
        assert_close(values(y), expected, half)
        assert not finished.any()


@pytest.mark.parametrize("half", HALVES)
def test_epsilons_of_the_norms(half: str, host_kernels: Build, numbers: Numbers) -> None:
    """Rows and groups whose variance is as small as the epsilon."""
    config = LayerConfig(half, 128, 2, 8)
    stream, x = numbers.normal(2, 3, 128, scale=1e-3)
    zeros = numbers.place(np.zeros((2, 1, 128), np.float32), "float32")
    result = shaped(numbers.nan(2, 3, 128, dtype="float32"), 2, 3, 128)
    host_kernels(config).run(layers.modulate_rows(stream, None, zeros, zeros, result))
    assert_close(values(result), normed(x), "float32")
    source, x = numbers.normal(1, 4, 4, 64, scale=1e-3)
    ones, none = numbers.place(np.ones(64, np.float32), "float32"), numbers.place(np.zeros(64, np.float32), "float32")
    partial = shaped(numbers.nan(1, 256, 32, 2, dtype="float32"), 1, 256, 32, 2)
    statistics = shaped(numbers.nan(1, 32, 2, dtype="float32"), 1, 32, 2)
    y = shaped(numbers.nan(1, 4, 4, 64, dtype=half), 1, 4, 4, 64)
    host_kernels(config).run(layers.group_statistics(source, partial, device_array(np.zeros(1, np.uint32)), statistics))
    host_kernels(config).run(layers.group_normalise(source, statistics, ones, none, y, silu=False))
    grouped = x.reshape(16, 32, 2)
    expected = (grouped - grouped.mean((0, 2))[:, None]) / np.sqrt(grouped.var((0, 2)) + 1e-6)[:, None]
    assert_close(values(y).reshape(16, 32, 2), expected, half)


def test_the_sums_of_a_norm_do_not_depend_on_the_order_of_blocks(host_kernels: Build, numbers: Numbers) -> None:
    """A GPU ends blocks in any order. Float sums in that order would differ from run to run."""
    x, _ = numbers.normal(2, 16, 16, 64, dtype="float16")
    results = []
    for order in range(3):
        partial = shaped(numbers.nan(2, 256, 32, 2, dtype="float32"), 2, 256, 32, 2)
        statistics = shaped(numbers.nan(2, 32, 2, dtype="float32"), 2, 32, 2)
        finished = np.zeros(2, np.uint32)
        launch = layers.group_statistics(x, partial, device_array(finished), statistics)
        host_kernels(LayerConfig("float16", 128, 2, 8)).run(launch, order=order)
        results.append(values(statistics))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])
    alone = shaped(numbers.nan(1, 32, 2, dtype="float32"), 1, 32, 2)
    partial = shaped(numbers.nan(1, 256, 32, 2, dtype="float32"), 1, 256, 32, 2)
    second = layers.group_statistics(x[1:], partial, device_array(np.zeros(1, np.uint32)), alone)
    host_kernels(LayerConfig("float16", 128, 2, 8)).run(second)
    assert np.array_equal(values(alone)[0], results[0][1])  # nor on the other images


@pytest.mark.parametrize("half", HALVES)
def test_look_up_and_doubling(half: str, host_kernels: Build, numbers: Numbers) -> None:
    config = LayerConfig(half, 128, 2, 16)
    codebook, codes = numbers.normal(97, 16, dtype=half)
    tokens = numbers.rng.integers(0, 97, (2, 3, 5)).astype(np.int32)
    x = shaped(numbers.nan(2, 3, 5, 16, dtype=half), 2, 3, 5, 16)
    host_kernels(config).run(layers.look_up(device_array(tokens), codebook, x))
    assert np.array_equal(values(x), codes[tokens])
    y = shaped(numbers.nan(2, 6, 10, 16, dtype=half), 2, 6, 10, 16)
    host_kernels(config).run(layers.double_map(x, y))
    assert np.array_equal(values(y), codes[tokens].repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize(("columns", "stride"), [(1, 8), (15, 16), (64, 64), (300, 304)])
def test_softmax(columns: int, stride: int, host_kernels: Build, numbers: Numbers) -> None:
    for half in HALVES:
        scores, x = numbers.normal(3, 5, stride, scale=20)
        out = shaped(numbers.nan(3, 5, stride, dtype=half), 3, 5, stride)
        host_kernels(LayerConfig(half, 128, 2, 8)).run(layers.softmax_rows(scores, out, columns))
        x = x[..., :columns]
        expected = np.exp(x - x.max(-1, keepdims=True))
        assert_close(values(out)[..., :columns], expected / expected.sum(-1, keepdims=True), half)
        assert not values(out)[..., columns:].any()


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "out_size"),
    [((5, 7), (3, 3), 1, (1, 1), (5, 7)), ((6, 8), (3, 3), 2, (0, 0), (3, 4)), ((4, 3), (1, 1), 1, (0, 0), (4, 3))],
)
def test_im2col(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    out_size: tuple[int, int],
    host_kernels: Build,
    numbers: Numbers,
) -> None:
    (H, W), (R, S), (top, left), (out_h, out_w) = size, kernel, padding, out_size
    padded = np.zeros((2, top + out_h * stride + R, left + out_w * stride + S, 8))
    for dtype, planar in (("float16", False), ("float32", True)):
        source, x = numbers.normal(*((2, 8, H, W) if planar else (2, H, W, 8)), dtype=dtype)
        padded[:, top : top + H, left : left + W] = x.transpose(0, 2, 3, 1) if planar else x
        length = R * S * 8 + 3
        columns = shaped(numbers.nan(2 * out_h * out_w, length, dtype=dtype), 2 * out_h * out_w, length)
        launch: Launch = layers.im2col(
            source, columns, kernel=kernel, stride=stride, padding=padding, out_size=out_size, planar=planar
        )
        host_kernels(LayerConfig("float16", 128, 2, 8)).run(launch)
        taps = [
            padded[:, r : r + out_h * stride : stride, s : s + out_w * stride : stride]
            for r in range(R)
            for s in range(S)
        ]
        got = values(columns)
        assert np.array_equal(got[:, :-3], np.concatenate(taps, -1).reshape(len(got), -1)) and not got[:, -3:].any()


def test_planes_and_sums_of_maps(host_kernels: Build, numbers: Numbers) -> None:
    for half in HALVES:
        host = host_kernels(LayerConfig(half, 128, 2, 8))
        for dtype in (half, "float32"):
            x, exact = numbers.normal(2, 17, 19, 8, dtype=dtype)
            planes = shaped(numbers.nan(2, 3, 17, 19, dtype="float32"), 2, 3, 17, 19)
            host.run(layers.to_planes(x, planes))
            assert np.array_equal(values(planes), exact.transpose(0, 3, 1, 2)[:, :3])
            added, b = numbers.normal(2, 17, 19, 8, dtype=half)
            for out_dtype in (half, "float32"):
                out = shaped(numbers.nan(2, 17, 19, 8, dtype=out_dtype), 2, 17, 19, 8)
                host.run(layers.add_maps(x, added, out))
                assert_close(values(out), exact + b, out_dtype)
                host.run(layers.add_maps(x, None, out))
                assert_close(values(out), exact, out_dtype)
        x, exact = numbers.normal(1, 2, 2, 8)
        host.run(layers.add_maps(x, shaped(added, 2, 17, 19, 8)[0].reshape(17 * 19 * 8)[:32].reshape(1, 2, 2, 8), x))
        assert_close(values(x), exact + b[0].reshape(-1)[:32].reshape(1, 2, 2, 8), "float32")


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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mean * mean), 0.0f)", "0.0), 0.0f)"),
        ("fast_exp2(-LOG2_E * values[k])", "fast_exp2(LOG2_E * values[k])"),
        ("for (u32 i = share; i < chunks; i += ADDERS) {", "for (u32 i = share; i < 1; i += ADDERS) {"),
        ("if (thread == 0) finished[image] = 0;", ""),
    ],
)
def test_mutants_of_the_norm_are_noticed(old: str, new: str, host_kernels: Build, numbers: Numbers) -> None:
    config = LayerConfig("float16", 128, 2, 8)
    assert config.source.count(old) == 1
    with pytest.raises(AssertionError):
        test_group_norms(
            "float16", 3, 16, 16, 64, 32, lambda c: host_kernels(c, source=c.source.replace(old, new)), numbers
        )


# --- NVRTC


def compiled(config: LayerConfig, target: str) -> dict[str, tuple[int, int, int]]:
    """Kernel to its registers, its bytes of shared memory and its bytes of spills, from NVRTC's log."""
    pytest.importorskip("cuda.core", reason="needs cuda.core and NVRTC, no GPU: pip install 'flexvar-deploy[gpu]'")
    cubin, text = compile_source(config.source, target, config)
    assert cubin.startswith(b"\x7fELF") and "warning" not in text.lower()
    found = {}
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        numbers = [re.search(pattern, part) for pattern in REPORTED]
        name = re.search(r"'(\w+)'", part)
        assert name is not None
        found[name[1]] = tuple(int(number[1]) if number else 0 for number in numbers)
    return found  # type: ignore[return-value]


REPORTED = r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores"
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str, half: str) -> None:
    """No kernel spills or has more shared memory than a block may have without asking."""
    for width, heads in ((1024, 16), (1536, 24)) if target == "sm_90" else ((1024, 16),):
        found = compiled(LayerConfig(half, width, heads, 32), target)
        assert set(found) == set(LayerConfig.names)
        for name, (registers, shared, spills) in found.items():
            assert spills == 0 and shared <= 48 * 1024 and registers <= (168 if name == "attention" else 80), name


@pytest.mark.kernels
@pytest.mark.parametrize(("width", "heads"), [(128, 8), (192, 6), (1280, 20), (2048, 16), (4096, 64)])
def test_kernels_of_other_sizes_compile(width: int, heads: int) -> None:
    for half in HALVES:
        found = compiled(LayerConfig(half, width, heads, 8), "sm_90")
        assert all(spills == 0 and shared <= 48 * 1024 for _, shared, spills in found.values())


# --- refusals


def test_sizes_without_kernels_are_refused() -> None:
    for arguments, needed in (
        ((96, 2, 8), "heads of size 16, 32, 64, 128, and this model has heads of size 48"),
        ((128, 2, 12), "codes of 8 to 256 numbers"),
        ((120, 7, 8), "heads of size 17"),
        ((32768, 512, 8), "a width of at most 16384"),
    ):
        with pytest.raises(BackendUnavailable, match=needed):
            LayerConfig("float16", *arguments)
    with pytest.raises(ValueError, match="not in float32"):
        LayerConfig("float32", 128, 2, 8)


def test_arrays_that_do_not_fit_are_refused() -> None:
    def array(*shape: int, dtype: str = "float16") -> DeviceArray:
        return DeviceArray(4096, shape, dtype, None)

    def wide(*shape: int) -> DeviceArray:
        return array(*shape, dtype="float32")

    branch = Branch(array(2, 3, 8), wide(2, 1, 8))
    rows = array(2, dtype="int32"), array(2, dtype="int32")
    calls: list[Callable[[], object]] = [
        lambda: layers.embed(wide(3, 8), wide(8, 16), wide(3, 16), wide(4, 16)),
        lambda: layers.modulate_rows(wide(2, 3, 8), None, wide(2, 1, 8), wide(3, 1, 8), array(2, 3, 8)),
        lambda: layers.modulate_rows(wide(2, 4, 8), branch, wide(2, 1, 8), wide(2, 1, 8), array(2, 4, 8)),
        lambda: layers.guide_rows(wide(2, 3, 8), branch, wide(2, 1, 8), wide(2, 1, 8), rows, wide(3), array(3, 3, 8)),
        lambda: layers.split_heads(array(1, 2, 24), wide(1), wide(1, 2, 8), array(2, 1, 1, 8), array(2, 1, 1, 8)),
        lambda: layers.split_heads(array(1, 2, 24), wide(1), array(1, 2, 8), array(1, 2, 1, 8), array(1, 2, 1, 8)),
        lambda: layers.class_rows(rows[0], wide(5, 8), wide(8), wide(8), array(3, 8), wide(3, 1, 8)),
        lambda: layers.look_up(rows[0], array(5, 8), array(2, 9)),
        lambda: layers.group_statistics(array(1, 4, 4, 8), wide(9), rows[0], wide(1, 8, 2)),
        lambda: layers.group_normalise(
            array(1, 4, 4, 8), wide(1, 3, 2), wide(8), wide(8), array(1, 4, 4, 8), silu=True
        ),
        lambda: layers.double_map(array(1, 4, 4, 8), array(1, 8, 4, 8)),
        lambda: layers.softmax_rows(wide(4, 8), array(4, 8), 9),
        lambda: layers.im2col(array(1, 4, 4, 8), array(15, 72), kernel=(3, 3), out_size=(4, 4)),
        lambda: layers.to_planes(array(1, 4, 4, 8), wide(1, 9, 4, 4)),
        lambda: layers.add_maps(array(1, 4, 4, 8), wide(1, 4, 4, 8), array(1, 4, 4, 8)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit"):
            call()
