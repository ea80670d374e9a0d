"""`sample_rows` gives the tokens of `sampling.sample` bit for bit, and mutations of it do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from host_kernels import HostKernels, KernelFailed, device_array
from numpy.typing import NDArray

from flexvar_runtime import noise, sampling
from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.kernels import STATUS_WORDS, KernelConfig, Refusal, kernel_source, read_status, stream_block

Build = Callable[..., HostKernels]
Float32 = NDArray[np.float32]
SEED, SCALE = 0x9E3779B97F4A7C15, 3
TOP_P = [0.0, 0.37, 0.95, 1.0]
INF, NAN = np.inf, np.nan


def config(vocabulary: int) -> KernelConfig:
    return KernelConfig(vocabulary=vocabulary, code_dim=8, width=16)


def indices(images: int) -> list[int]:
    return [2**32 * i + 7 * i + 1 for i in range(images)]


def make_rows(seed: int, B: int, L: int, V: int) -> Float32:
    """Rows of every kind in turn: spread, flat, with many ties, masked, all equal, one finite, steep, far from 0."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((B * L, V)) * 3).astype(np.float32)
    for i, row in enumerate(rows):
        match i % 10:
            case 2:
                row *= np.float32(0.01)
            case 3:
                row[:] = np.round(row * 2) / 2
            case 4:
                row[1:][rng.random(V - 1) < 0.7] = -INF
            case 5:
                row[:] = np.float32(-7.25)
            case 6:
                row[:] = -INF
                row[rng.integers(V)] = -1e30
            case 7:
                row *= 20
            case 8:
                row += np.float32(3000)  # neighbouring floats are 2**-12 apart: ties, and equal differences
            case 9:
                row[:] = rng.integers(-1, 1, V) * np.float32(0.0)  # 0 and -0 are equal
    return rows.reshape(B, L, V)


def host_tokens(logits_BLV: Float32, images: list[int], top_k: int, top_p: float, scale: int = SCALE) -> Any:
    B, L, V = logits_BLV.shape
    draws = np.concatenate([noise.draws(SEED, index, scale, L) for index in images])
    return sampling.sample(logits_BLV.reshape(B * L, V), draws, top_k=top_k, top_p=top_p).reshape(B, L)


def kernel_tokens(
    host: HostKernels,
    logits_BLV: Float32,
    images: list[int],
    top_k: int,
    top_p: float,
    *,
    scale: int = SCALE,
    order: int = 0,
) -> tuple[NDArray[np.int32], Refusal | None]:
    B, L, _ = logits_BLV.shape
    guarded = np.full((B + 2, L), -1, np.int32)
    status = np.zeros(STATUS_WORDS, np.uint32)
    arrays = logits_BLV, stream_block(SEED, images), guarded[1:-1], status
    launch = kernels.sample_rows(*map(device_array, arrays), scale=scale, top_k=top_k, top_p=top_p)
    host.run(launch, order=order)
    assert (guarded[[0, -1]] == -1).all()  # nothing is written beside the tokens
    return guarded[1:-1], read_status(status)


def assert_equal(host: HostKernels, logits: Float32, top_k: int, top_p: float, order: int = 0) -> None:
    images = indices(len(logits))
    tokens, refusal = kernel_tokens(host, logits, images, top_k, top_p, order=order)
    assert refusal is None
    assert np.array_equal(tokens, host_tokens(logits, images, top_k, top_p)), (top_k, top_p, order)


# --- the same tokens


@pytest.mark.parametrize("top_p", TOP_P)
@pytest.mark.parametrize(("V", "block"), [(512, 64), (8912, 256), (16384, 128)])
def test_tokens_equal_the_host(V: int, block: int, top_p: float, host_kernels: Build) -> None:
    host = host_kernels(config(V), block=block)
    for top_k in (0, 1, 50, 900, V):
        for order, (B, L) in enumerate([(1, 10), (7, 2)]):
            assert_equal(host, make_rows(top_k + V + B, B, L, V), top_k, top_p, order)


@pytest.mark.parametrize("V", [512, 8912])
def test_many_images(V: int, host_kernels: Build) -> None:
    host = host_kernels(config(V), block=64 if V == 512 else 256)
    for top_k, top_p in [(900, 0.95), (50, 0.37)]:
        assert_equal(host, make_rows(V, 64, 1, V), top_k, top_p)


@pytest.mark.parametrize(("V", "options"), [(8912, (900, 0.95)), (16384, (0, 0.95)), (16384, (3000, 0.5))])
def test_blocks_as_on_a_gpu(V: int, options: tuple[int, float], host_kernels: Build) -> None:
    assert config(V).block == 1024
    assert_equal(host_kernels(config(V)), make_rows(V, 1, 10, V), *options)


@pytest.mark.parametrize("V", [1, 31, 33, 97])
def test_vocabularies_that_fill_no_warp(V: int, host_kernels: Build) -> None:
    host = host_kernels(config(V))
    for top_k, top_p in itertools.product((0, 1, 2, V - 1, V + 5), TOP_P):
        assert_equal(host, make_rows(V, 2, 20, V), max(top_k, 0), top_p)


def test_every_mass_and_count(host_kernels: Build) -> None:
    """Small rows with few levels: every boundary lies in a tie. What is drawn, and how often, is the host's."""
    host, V, draws = host_kernels(config(40), block=32), 40, 64
    rng = np.random.default_rng(0)
    for _ in range(60):
        row = rng.choice(np.array([0, -0.0, -0.5, -1, -1, -3, -20, -40, -INF], np.float32), V)
        row[rng.integers(V)] = 0
        top_k, top_p = int(rng.integers(0, V + 1)), float(rng.choice([0.0, 1e-300, 0.1, 0.5, 0.9, 0.999, rng.random()]))
        assert_equal(host, np.tile(row, (1, draws, 1)), top_k, top_p)


@pytest.mark.parametrize("top_p", [0.0, 0.6])
def test_the_ends_of_the_cdf(top_p: float, host_kernels: Build) -> None:
    """Images whose first draw is among the smallest and largest of a million."""
    counter = np.zeros((10**6, 4), np.uint32)
    counter[:, 1], counter[:, 2] = SCALE, np.arange(10**6)
    order = np.argsort(noise.philox4x32(counter, (SEED & 0xFFFFFFFF, SEED >> 32))[:, 0])
    images = [int(i) for i in (*order[:20], *order[-20:])]
    smallest, largest = (int(noise.draws(SEED, i, SCALE, 1)[0]) for i in (images[0], images[-1]))
    assert smallest < 100 and largest > 2**24 - 100
    logits = np.zeros((40, 1, 4096), np.float32)
    tokens, _ = kernel_tokens(host_kernels(config(4096), block=64), logits, images, 0, top_p)
    assert np.array_equal(tokens, host_tokens(logits, images, 0, top_p))
    assert (tokens.min() == 0) == (top_p == 0.0) and tokens.max() == 4095


def test_order_of_threads_does_not_matter(host_kernels: Build) -> None:
    host, logits = host_kernels(config(512), block=128), make_rows(1, 1, 10, 512)
    for order, (top_k, top_p) in itertools.product(range(6), [(50, 0.95), (0, 0.5), (50, 0.0)]):
        assert_equal(host, logits, top_k, top_p, order)


@pytest.mark.parametrize("scale", [0, 2**16 - 1])
def test_scales_have_their_own_draws(scale: int, host_kernels: Build) -> None:
    logits, images = make_rows(0, 3, 10, 512), indices(3)
    tokens, _ = kernel_tokens(host_kernels(config(512), block=64), logits, images, 0, 0.95, scale=scale)
    assert np.array_equal(tokens, host_tokens(logits, images, 0, 0.95, scale))
    assert not np.array_equal(tokens, host_tokens(logits, images, 0, 0.95))


WEIGHTS = """
KERNEL(256) weights(const float *__restrict__ differences, u64 *__restrict__ out, u32 count) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i < count) out[i] = weight_of(differences[i]);
}
"""


def weights_of(host: HostKernels, differences: Float32) -> NDArray[np.int64]:
    import ctypes

    out = np.zeros(len(differences), np.int64)
    args = differences.ctypes.data, out.ctypes.data, ctypes.c_uint32(len(out))
    host.run(kernels.Launch("weights", (-(-len(out) // 256), 1, 1), (256, 1, 1), 0, args))
    return out


def differences() -> Float32:
    rng = np.random.default_rng(0)
    bits = rng.integers(0x80000000, 0xC2000000, 200_000, dtype=np.uint32).view(np.float32)  # -0 to -32, every exponent
    edges = np.array([0, -0.0, -INF, -28, -27.75, -3e38, -1e-45, *(k * -np.log(2) for k in range(42))], np.float32)
    return np.concatenate([-rng.random(200_000, np.float32) * 30, bits, edges, np.nextafter(edges, np.float32(-1))])


def test_weights_equal_the_host(host_kernels: Build) -> None:
    x = differences()
    assert np.array_equal(weights_of(host_kernels(config(64), source=kernel_source() + WEIGHTS), x), sampling._weights(x))


def test_fused_arithmetic_is_noticed(host_kernels: Build) -> None:
    fused = mutated("p = __dadd_rn(__dmul_rn(p, r), 1.0 / factorial)", "p = fma(p, r, 1.0 / factorial)") + WEIGHTS
    x = differences()
    assert not np.array_equal(weights_of(host_kernels(config(64), source=fused), x), sampling._weights(x))


# --- refusals


@pytest.mark.parametrize("bad", [[NAN], [-NAN], [INF], [-INF], [NAN, INF], [NAN, -INF]])
def test_rows_without_a_finite_maximum_are_refused(bad: list[float], host_kernels: Build) -> None:
    logits, images = make_rows(0, 3, 10, 97), indices(3)
    expected = host_tokens(logits, images, 50, 0.95)
    for image, position in [(0, 4), (1, 3), (2, 9)]:  # the first is told
        if bad == [-INF]:
            logits[image, position] = -INF
        else:
            logits[image, position, 96 : 96 - len(bad) : -1] = bad
        expected[image, position] = 0
    for order, (top_k, top_p) in enumerate([(50, 0.95), (0, 0.0), (1, 0.95)]):
        tokens, refusal = kernel_tokens(host_kernels(config(97)), logits, images, top_k, top_p, order=order)
        assert refusal == Refusal("logits", SCALE, 4)
        if (top_k, top_p) == (50, 0.95):
            assert np.array_equal(tokens, expected)  # the other rows are as ever


def test_the_first_scale_refused_is_told(host_kernels: Build) -> None:
    host, status = host_kernels(config(97)), np.zeros(STATUS_WORDS, np.uint32)
    for scale, row in [(5, 0), (2, 7), (2, 3), (4, 1)]:
        logits = make_rows(0, 1, 10, 97)
        logits[0, row, 5] = NAN
        arrays = logits, stream_block(SEED, [0]), np.zeros((1, 10), np.int32), status
        host.run(kernels.sample_rows(*map(device_array, arrays), scale=scale, top_k=0, top_p=0.0))
    assert read_status(status) == Refusal("logits", 2, 3)


# --- negative controls


def mutated(old: str, new: str, source: str | None = None) -> str:
    source = kernel_source() if source is None else source
    assert source.count(old) == 1, (source.count(old), old)
    return source.replace(old, new)


MUTATIONS = {
    "equal weights are dropped whatever their place": ("&& place < (int)(bound", "&& place >= (int)(bound"),
    "ties at the threshold are dropped": ("kept += (u32)__popc(__ballot_sync(ALL_LANES, (u32)ranks[i] >= threshold))",
                                          "kept += (u32)__popc(__ballot_sync(ALL_LANES, (u32)ranks[i] > threshold))"),
    "counter words swapped": ("c0 = position, c1 = scale", "c0 = scale, c1 = position"),
    "key words swapped": ("k0 = streams[0], k1 = streams[1]", "k0 = streams[1], k1 = streams[0]"),
    "a draw of 32 bits": ("return c0 >> 8;", "return c0;"),
    "-0 below 0": ("key_of(__fadd_rn(value, 0.0f))", "key_of(value)"),
    "the top token can be dropped": ("if (limit >= sum) limit = sum - 1;", "if (limit >= sum) limit = sum;"),
    "top-k takes one less": ("(u64)(VOCABULARY - top_k)", "(u64)(VOCABULARY - top_k + 1)"),
    "a limb is lost": ("limb < LIMBS; limb++", "limb < LIMBS - 1; limb++"),
    "a draw on a boundary stays": ("__ballot_sync(ALL_LANES, cumulative > target)",
                                   "__ballot_sync(ALL_LANES, cumulative >= target)"),
    "bit by bit starts too low": ("weighted ? WEIGHT_BITS : 31)", "weighted ? WEIGHT_BITS - 1 : 31)"),
    "no candidates beyond the first warp": ("c < count; c += BLOCK", "c < min(count, 32u); c += BLOCK"),
}  # fmt: skip


def disagrees(host: HostKernels, orders: range = range(1)) -> bool:
    """Whether some row of a broad choice gets another token than on the host, or the block does not run."""
    ties = np.tile(np.array([0.0] * 3 + [-1.0] * 250 + [-2.0] * 259, np.float32), (1, 8, 1))
    zeros = np.tile(np.array([0.0, -0.0] * 256, np.float32), (1, 8, 1))
    dense = (np.random.default_rng(0).standard_normal((1, 8, 512)) * 0.4).astype(np.float32)
    logits = np.concatenate([make_rows(3, 1, 20, 512), ties, zeros, dense, 10 * dense], axis=1)
    steps = np.linspace(0.1, 0.9, 5)
    choices = [(0, 0.0), (0, 1e-300), (1, 0.5), *((k, float(p)) for k in (0, 2, 50, 129, 400) for p in steps)]
    for order, (top_k, top_p) in itertools.product(orders, choices):
        try:
            tokens, _ = kernel_tokens(host, logits, [5], top_k, top_p, order=order)
        except KernelFailed:
            return True
        if not np.array_equal(tokens, host_tokens(logits, [5], top_k, top_p)):
            return True
    return False


def test_the_kernel_itself_agrees(host_kernels: Build) -> None:
    assert not disagrees(host_kernels(config(512), block=64))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation: str, host_kernels: Build) -> None:
    host = host_kernels(config(512), block=64, source=mutated(*MUTATIONS[mutation]))
    assert disagrees(host)


def without_barrier(number: int) -> str:
    parts = kernel_source().split("__syncthreads();")
    assert len(parts) > number + 1
    return "__syncthreads();".join(parts[: number + 1]) + ";" + "__syncthreads();".join(parts[number + 1 :])


BARRIERS = kernel_source().count("__syncthreads();")


@pytest.mark.parametrize("number", range(BARRIERS))
def test_every_barrier_is_needed(number: int, host_kernels: Build) -> None:
    assert disagrees(host_kernels(config(512), block=128, source=without_barrier(number)), range(3))


def test_a_sum_read_late_is_noticed(host_kernels: Build) -> None:
    """The array of sums alternates: without that, a fast warp overwrites what a slow one still has to read."""
    source = mutated("block_sum(s, below, bit & 1)", "block_sum(s, below, 0)")
    assert disagrees(host_kernels(config(512), block=128, source=source), range(3))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  if (kept == 1) return;", "  if (kept == 1 || thread == 40) return;", r"thread|lane"),
        ("    moved = needed < ITEMS", "    if (warp) __syncthreads();\n    moved = needed < ITEMS", r"barrier"),
        ("    moved = needed < ITEMS", "    if (lane) __ballot_sync(ALL_LANES, 1);\n    moved = needed < ITEMS", r"lane"),
    ],
)
def test_threads_that_do_not_meet_are_an_error(old: str, new: str, message: str, host_kernels: Build) -> None:
    host = host_kernels(config(512), block=64, source=mutated(old, new))
    with pytest.raises(KernelFailed, match=message):
        kernel_tokens(host, make_rows(0, 1, 3, 512), [0], 50, 0.95)
    with pytest.raises(KernelFailed, match=message):  # and again: what was left behind does no harm
        kernel_tokens(host, make_rows(0, 1, 3, 512), [0], 50, 0.95)
