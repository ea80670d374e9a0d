"""The kernels of `attention.cu` on a CPU against float64, mutants that must fail, and compilation by NVRTC."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_kernels import HostKernels, KernelFailed, parameters
from numpy.typing import NDArray

from flexvar_runtime.cuda import attention as launches
from flexvar_runtime.cuda import compilation
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.attention import attention

Build = Callable[..., HostKernels]
Array = NDArray[Any]
HALVES = ["float16", "bfloat16"]
BITS = {"float16": 11, "bfloat16": 8, "float32": 24}  # significant bits
GUARD = 512  # elements around an array: more than a row
SPREADS = [0.1, 8.0, 100.0]  # temperatures: scores are between -spread and spread
HEAD_SIZES = range(16, 129, 16)
NEW_TOKENS = [1, 4, 9, 25, 64, 65, 100]


@dataclass(frozen=True)
class AttentionConfig:
    half: str = "float16"
    head_size: int = 64
    heads: int = 2

    names = launches.KERNEL_NAMES
    fuses = True

    @property
    def source(self) -> str:
        return compilation.read_sources("common.cu", "half.cu", "attention.cu")

    def defines(self) -> dict[str, int]:
        return {"FLOAT16": int(self.half == "float16"), "HEAD_SIZE": self.head_size, "HEADS": self.heads}


# --- arrays


def stored(values: Array, dtype: str) -> Array:
    """The values rounded to a dtype. bfloat16 is stored as its bits."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def numbers(array: Array) -> NDArray[np.float64]:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def nan(dtype: str) -> Any:
    return 0x7FFF if dtype == "bfloat16" else np.nan


def guarded(values: Array, dtype: str) -> tuple[Array, Array]:
    """A copy of the values with NaN before and after it, and this whole memory."""
    inside = stored(values, dtype)
    memory = np.full(inside.size + 2 * GUARD, nan(dtype), inside.dtype)
    memory[GUARD:-GUARD] = inside.reshape(-1)
    return memory[GUARD:-GUARD].reshape(inside.shape), memory


def on_device(array: Array, dtype: str) -> DeviceArray:
    return DeviceArray(array.ctypes.data, array.shape, dtype, array)


@dataclass(frozen=True)
class Case:
    """N sequences of L new tokens that attend to T tokens. scales: number of tokens of each scale, in order."""

    N: int = 2
    L: int = 65
    T: int = 130
    spread: float = 8.0
    wide: bool = False
    scale_of: tuple[int, ...] | None = None
    order: int = 0


def prefill(sizes: Sequence[int], **options: Any) -> Case:
    """A case with scales of these numbers of tokens."""
    scale_of = tuple(scale for scale, size in enumerate(sizes) for _ in range(size))
    return Case(L=len(scale_of), T=len(scale_of), scale_of=scale_of, **options)


def units(rng: np.random.Generator, *shape: int) -> Array:
    values = rng.standard_normal(shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def error_of(host: HostKernels, case: Case) -> float:
    """The largest error of a result, as a part of what is allowed. NaN if a result is NaN."""
    config: Any = host.config
    half, D, H, N, L, T = config.half, config.head_size, config.heads, case.N, case.L, case.T
    rng = np.random.default_rng(1000 * L + T)
    dtype = "float32" if case.wide else half
    q, _ = guarded(case.spread * units(rng, N, L, H, D), dtype)
    caches = []
    for values in (units(rng, T + 5, N, H, D), rng.standard_normal((T + 5, N, H, D))):
        cache = stored(values, half)
        cache[:2], cache[T + 2 :] = nan(half), nan(half)
        caches.append(cache)
    keys, values = (cache[2 : T + 2] for cache in caches)
    out, memory = guarded(np.full((N, L, H * D), np.nan), dtype)
    memory[:GUARD] = memory[-GUARD:] = 1
    scale_of = None if case.scale_of is None else np.array(case.scale_of, np.int32)
    views = [on_device(cache, half)[2 : T + 2] for cache in caches]
    scales = None if scale_of is None else on_device(scale_of, "int32")
    launch = attention(on_device(q, dtype), *views, on_device(out, dtype), scales)
    host.run(launch, order=case.order)
    if (memory[:GUARD] != 1).any() or (memory[-GUARD:] != 1).any():
        return np.inf  # written outside the array

    scores = np.einsum("nlhd,tnhd->nhlt", numbers(q), numbers(keys))
    if scale_of is not None:
        scores[..., scale_of[None, :] > scale_of[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("nhlt,tnhd->nlhd", weights, numbers(values)).reshape(out.shape)
    size = np.einsum("nhlt,tnhd->nlhd", weights, np.abs(numbers(values))).reshape(out.shape)
    # The result is rounded once, and so is every weight in `attention`. A score is a sum of D numbers in float32.
    rounding = 2.0 ** -BITS[dtype] + (2.0 ** -BITS[half] if launch.name == "attention" else 0.0)
    allowed = size * (rounding + D * case.spread * 2.0**-24) + 1e-6
    return float(np.max(np.abs(numbers(out) - expected) / allowed))


def worst(host: HostKernels, cases: Iterable[Case]) -> float:
    return float(np.max([error_of(host, case) for case in cases]))


@pytest.fixture(params=["attention", "attention_rows"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn, for any number of tokens."""
    monkeypatch.setattr(launches, "FEW_TOKENS", 0 if request.param == "attention" else 10**9)
    return str(request.param)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel `attention` for any number of tokens."""
    monkeypatch.setattr(launches, "FEW_TOKENS", 0)


# --- results


def sweep(sequences: Sequence[int]) -> list[Case]:
    """Every number of new tokens, without a past and with one whose tokens end at, before and after a tile's edge."""
    lengths = [(L, T) for L in NEW_TOKENS for T in (L, 64, 65, 128, 130) if T >= L]
    choices = zip(itertools.cycle(SPREADS), itertools.cycle(sequences), itertools.cycle(range(4)), strict=False)
    return [Case(N, L, T, spread, order=order) for (L, T), (spread, N, order) in zip(lengths, choices, strict=False)]


@pytest.mark.parametrize(("half", "head_size"), [("float16", 64), ("bfloat16", 64), ("float16", 32), ("bfloat16", 32)])
def test_results_equal_float64(half: str, head_size: int, kernel: str, host_kernels: Build) -> None:
    assert worst(host_kernels(AttentionConfig(half, head_size)), sweep([1, 2, 3])) <= 1


@pytest.mark.parametrize("head_size", [16, 96, 128])
def test_other_head_sizes(head_size: int, kernel: str, host_kernels: Build) -> None:
    cases = [Case(2, 9, 9), Case(1, 65, 130), Case(3, 4, 64)]
    assert worst(host_kernels(AttentionConfig("float16", head_size, heads=3)), cases) <= 1


@pytest.mark.kernels
@pytest.mark.parametrize(("half", "head_size"), [*itertools.product(HALVES, HEAD_SIZES)])
def test_all_head_sizes(half: str, head_size: int, kernel: str, host_kernels: Build) -> None:
    assert worst(host_kernels(AttentionConfig(half, head_size, heads=3)), sweep([3, 1, 2])) <= 1


@pytest.mark.kernels
def test_all_numbers_of_tokens(kernel: str, host_kernels: Build) -> None:
    cases = [Case(1 + T % 2, L, T, SPREADS[T % 3], order=T) for T in range(1, 200) for L in {1, T // 3 + 1, T}]
    assert worst(host_kernels(AttentionConfig()), cases) <= 1


SCALES = [
    prefill([1, 4, 9, 16, 25]),
    prefill([1, 4, 9, 16, 25, 36, 49], spread=100.0, N=1, order=3),
    prefill([64, 64, 1], spread=0.1),
    # in any order: the first tile has no token that tokens 64 to 69 can attend to
    Case(L=70, T=70, scale_of=(1,) * 64 + (0,) * 6),
    Case(N=3, L=130, T=130, scale_of=tuple(np.random.default_rng(0).integers(0, 5, 130).tolist())),
]


@pytest.mark.parametrize("half", HALVES)
def test_masked_prefill(half: str, kernel: str, host_kernels: Build) -> None:
    assert worst(host_kernels(AttentionConfig(half)), SCALES) <= 1


@pytest.mark.parametrize("half", HALVES)
def test_wide_rows(half: str, host_kernels: Build) -> None:
    cases = [Case(2, 1, 1, wide=True), Case(3, 9, 130, wide=True), prefill([1, 4, 9], wide=True)]
    assert worst(host_kernels(AttentionConfig(half)), cases) <= 1


def test_equal_keys_give_the_mean(kernel: str, host_kernels: Build) -> None:
    """Every weight is 1/T. The values are 1 to T, so their mean is (T + 1) / 2."""
    for T in (1, 2, 33, 129):
        q, keys = np.ones((1, 3, 2, 64), np.float16), np.ones((T, 1, 2, 64), np.float16)
        values = np.broadcast_to(np.arange(1, T + 1).reshape(T, 1, 1, 1), keys.shape).astype(np.float16)
        out = np.zeros((1, 3, 128), np.float16)
        arrays = [on_device(array, "float16") for array in (q, keys, values, out)]
        host_kernels(AttentionConfig()).run(attention(*arrays))
        assert np.array_equal(out, np.full_like(out, (T + 1) / 2))


# --- mutants

STEP = "if (first + ATTENTION_KEYS < block_end)\n"
MUTANTS = {
    "no mask of the tail": ("token >= tokens ? LATEST_SCALE : ", ""),
    "a mask that is one token late": ("token >= tokens ? LATEST", "token > tokens ? LATEST"),
    "no mask of scales": ("if (scale > scale1) scores[i / 2][2 + i % 2] = NO_SCORE;", ""),
    "another key": ("const u32 token = first + row + i;", "const u32 token = first + row + i + 1;"),
    "another head": ("blockIdx.z * HEADS + blockIdx.y) * HEAD", "blockIdx.z * HEADS + 1 - blockIdx.y) * HEAD"),
    "results that are not rescaled": ("sums[i][2] *= factor1, sums[i][3] *= factor1;", ""),
    "a sum that is not rescaled": ("sum0 *= factor0, sum1 *= factor1;", ""),
    "a maximum of one lane": ("new1 = lanes_max(new1, 4);", ""),
    "minus infinity minus itself": ("top == NO_SCORE ? 0.0f : top * LOG2_E", "top * LOG2_E"),
    "no wait": ("    wait_for_copies();\n", ""),
    "a group that is not ended": ("\n  end_copies();\n", "\n"),
    "no barrier": ("    __syncthreads();", "    "),
    "a copy before the barrier": ("    __syncthreads();", f"    {STEP}      copy_tile(tiles[stage ^ 1][0], "
                                  "tiles[stage ^ 1][1], keys, values, first + ATTENTION_KEYS, tokens, token_stride);\n"
                                  "    __syncthreads();"),
    "one buffer": ("stage ^= 1)", "stage ^= 0)"),
    "values that are not transposed": ("load_transposed(m, tiles", "load_matrices(m, tiles"),
    "keys that are transposed": ("load_matrices(m, tiles", "load_transposed(m, tiles"),
    "too few keys of a block": ("(u32)scale_of[token] <= top", "(u32)scale_of[token] < top"),
    "too few masks": ("(u32)scale_of[token] > low", "(u32)scale_of[token] > low + 1"),
    "exchanged halves": ("odd ? low0 : high0", "odd ? high0 : low0"),
    "a row after the last": ("row1 = min(warp_row + lane / 4 + 8, new_tokens - 1)",
                             "row1 = min(warp_row + lane / 4 + 8, new_tokens)"),
}  # fmt: skip
MUTANT_CASES = [
    Case(1, 65, 130, spread=100.0, order=1),
    Case(1, 4, 65, spread=0.1),
    prefill([1, 4, 9, 16, 25, 36, 49], N=1),
    Case(N=1, L=70, T=70, scale_of=(1,) * 64 + (0,) * 6),
]


def mutant(old: str, new: str, directory: Path) -> HostKernels:
    source = AttentionConfig().source
    assert old in source
    return HostKernels(AttentionConfig(), directory, source=source.replace(old, new), level="-O0")  # compiles faster


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, tmp_path: Path) -> None:
    assert not worst(mutant(*MUTANTS[name], tmp_path), MUTANT_CASES) <= 1  # NaN too


@pytest.mark.usefixtures("tensor_cores")
def test_what_a_gpu_would_not_report_is_an_error_here(tmp_path: Path) -> None:
    mutants = {
        "bank conflicts": ("(chunk ^ (row & 7))", "chunk"),
        "line": ("load_matrices(m, tiles", "if (lane) load_matrices(m, tiles"),
        "1 threads left": ("    wait_for_copies();\n", "    if (threadIdx.x == 99) return;\n    wait_for_copies();\n"),
        "not aligned": ("u64 offset = ", "u64 offset = 4 + "),
    }
    for message, (old, new) in mutants.items():
        with pytest.raises(KernelFailed, match=message):
            error_of(mutant(old, new, tmp_path / message), Case(1, 2, 3))


ROW_MUTANTS = {
    "no mask of the tail": ("token >= tokens ? LATEST_SCALE : ", ""),
    "no mask of scales": ("scores[i] = key_scale > scale ? NO_SCORE : score", "scores[i] = score"),
    "results that are not rescaled": ("for (int j = 0; j < 8; j++) sums[j] *= factor;\n    UNROLL", "UNROLL"),
    "groups that are not rescaled": ("offset_of(all_top))", "offset_of(top))"),
    "minus infinity minus itself": ("top == NO_SCORE ? 0.0f : top * LOG2_E", "top * LOG2_E"),
}


@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_mutants_of_rows_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launches, "FEW_TOKENS", 10**9)
    assert not worst(mutant(*ROW_MUTANTS[name], tmp_path), [*MUTANT_CASES, Case(1, 1, 1)]) <= 1


# --- launches


def test_the_names_are_those_of_the_source() -> None:
    assert set(launches.KERNEL_NAMES) == set(parameters(AttentionConfig().source))


def array(*shape: int, dtype: str = "float16", address: int = 256) -> DeviceArray:
    return DeviceArray(address, shape, dtype, None)


def test_few_tokens_and_float32_need_no_tensor_cores() -> None:
    def name(L: int, T: int, dtype: str = "float16") -> str:
        q, out = array(2, L, 3, 64, dtype=dtype), array(2, L, 192, dtype=dtype)
        return attention(q, array(T, 2, 3, 64), array(T, 2, 3, 64), out).name

    assert [name(1, 1), name(4, 16), name(1, 17), name(4, 30, "float32")] == [
        "attention_rows",
        "attention_rows",
        "attention",
        "attention_rows",
    ]


def test_arrays_that_do_not_fit_are_refused() -> None:
    good: dict[str, Any] = {
        "q": array(2, 5, 3, 64),
        "keys": array(20, 2, 3, 64),
        "values": array(20, 2, 3, 64),
        "out": array(2, 5, 192),
    }
    assert attention(**good).grid == (1, 3, 2)
    wrong: list[dict[str, Any]] = [
        {"q": array(2, 5, 192)},
        {"q": array(2, 0, 3, 64), "out": array(2, 0, 192)},
        {"q": array(3, 5, 3, 64)},
        {"keys": array(20, 2, 64, 3)},
        {"keys": array(19, 2, 3, 64)},
        {"values": array(21, 2, 3, 64)},
        {"out": array(2, 5, 191)},
        {"out": array(2, 5, 192, dtype="float32")},
        {"q": array(2, 5, 3, 64, dtype="bfloat16"), "out": array(2, 5, 192, dtype="bfloat16")},
        {"values": array(20, 2, 3, 64, dtype="bfloat16")},
        {name: array(*good[name].shape, dtype="float32") for name in good},
        {"keys": array(20, 2, 3, 64, address=264)},
        {"scale_of": array(20, dtype="int32")},
        {name: array(*shape) for name, shape in {"q": (1, 5, 1, 24), "out": (1, 5, 24)}.items()}
        | {"keys": array(20, 1, 1, 24), "values": array(20, 1, 1, 24)},
    ]
    for arrays in wrong:
        with pytest.raises(ValueError, match="do not fit"):
            attention(**(good | arrays))
    same = {"q": array(2, 20, 3, 64), "out": array(2, 20, 192)}
    for scale_of in (array(20, dtype="int64"), array(19, dtype="int32"), array(20, 1, dtype="int32")):
        with pytest.raises(ValueError, match="do not fit"):
            attention(**(good | same), scale_of=scale_of)


# --- NVRTC

FUNCTION = re.compile(
    r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)$",
    re.DOTALL | re.MULTILINE,
)
NEEDS_NVRTC = "needs cuda.core and NVRTC, no GPU: pip install 'flexvar-deploy[gpu]'"


def check_compilation(target: str, config: AttentionConfig) -> bytes:
    pytest.importorskip("cuda.core", reason=NEEDS_NVRTC)
    cubin, log = compilation.compile_source(config.source, target, config)
    # no kernel here uses `half_of` of half.cu
    assert set(re.findall(r"warning #[^\n]*", log)) <= {
        'warning #177-D: function "half_of" was declared but never referenced'
    }
    found = {
        name: (int(stores), int(loads), int(used), rest) for name, stores, loads, used, rest in FUNCTION.findall(log)
    }
    assert set(found) == set(config.names)
    for name, (stores, loads, registers, rest) in found.items():
        assert stores == loads == 0
        shared = re.search(r"(\d+) bytes smem", rest)
        assert int(shared[1]) <= 48 * 1024 if shared else name == "attention_rows"
        if name == "attention_rows":
            assert registers <= 64
        elif config.head_size <= 64 and int(target.removeprefix("sm_")) < 100:
            assert registers <= 128  # for 4 blocks on a multiprocessor
        else:
            assert registers <= (168 if config.head_size <= 112 else 255)  # for 3 blocks, or 2
    return cubin


@pytest.mark.parametrize("half", HALVES)
def test_it_compiles(half: str) -> None:
    check_compilation("sm_90", AttentionConfig(half, heads=16))


TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]


@pytest.mark.kernels
@pytest.mark.parametrize(("target", "half"), [*itertools.product(TARGETS, HALVES)])
def test_it_compiles_for_every_gpu(target: str, half: str) -> None:
    for heads in (12, 16, 20, 24, 30):
        check_compilation(target, AttentionConfig(half, 64, heads))
    for head_size in HEAD_SIZES:
        check_compilation(target, AttentionConfig(half, head_size, 16))


def disassembler() -> str:
    """The path of nvdisasm, of CUDA or of the package nvidia-cuda-nvdisasm. Skips the test if there is none."""
    for folder in sys.path:
        for found in Path(folder).glob("nvidia/cu*/bin/nvdisasm"):
            return str(found)
    found_tool = shutil.which("nvdisasm")
    if found_tool is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    return found_tool


@pytest.mark.kernels
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_it_uses_tensor_cores_and_asynchronous_copies(target: str, tmp_path: Path) -> None:
    """The loop has 64 products and 32 loads of matrices for 16 queries, 64 keys and head size 64."""
    tool = disassembler()
    path = tmp_path / "attention.cubin"
    path.write_bytes(check_compilation(target, AttentionConfig(heads=16)))
    text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bHMMA\.16816\.F32", text)) == 64
    assert len(re.findall(r"\bLDSM\.16\.M88\.4", text)) == len(re.findall(r"\bLDSM\.16\.MT88\.4", text)) == 16
    assert len(re.findall(r"\bLDGSTS\.E\.BYPASS", text)) == 16  # 8 for the first tile, 8 in the loop
