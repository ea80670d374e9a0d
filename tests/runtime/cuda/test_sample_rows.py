"""`sample_rows` gives exactly the tokens of `sampling.sample`, and mutations of it do not."""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sampling_proof
from host_kernels import COMPILER, HostKernels, KernelFailed, device_array
from numpy.typing import NDArray
from sampling_proof import (
    SCALE,
    SEED,
    Float32,
    config,
    host_tokens,
    kernel_tokens,
    make_rows,
    mutants,
    mutated,
    option_words,
    row_on_a_boundary,
)

from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.kernels import STATUS_WORDS, Refusal, kernel_source, read_status, stream_block
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.model import noise, sampling

Build = Callable[..., HostKernels]
TOP_P = [0.0, 0.37, 0.95, 1.0]
INF, NAN = np.inf, np.nan


def indices(images: int) -> list[int]:
    return [2**32 * i + 7 * i + 1 for i in range(images)]


def assert_equal(host: HostKernels, logits: Float32, top_k: int, top_p: float, order: int = 0) -> None:
    images = indices(len(logits))
    tokens, refusal = kernel_tokens(host, logits, images, top_k, top_p, order=order)
    assert refusal is None
    assert np.array_equal(tokens, host_tokens(logits, images, top_k, top_p)), (top_k, top_p, order)


# --- the same tokens


@pytest.mark.parametrize("top_p", TOP_P)
@pytest.mark.parametrize(("V", "block"), [(512, 64), (8912, 256), (16384, 128)])
def test_tokens_equal_the_host(V: int, block: int, top_p: float, host_kernels: Build) -> None:
    host, shapes = host_kernels(config(V), block=block), [(7, 2), (1, 10), (64, 1)]
    for top_k in (0, 1, 50, 900, V):
        for order, (B, L) in enumerate(shapes if V == 512 else shapes[:1]):  # 14 rows have all ten kinds
            assert_equal(host, make_rows(top_k + V + B, B, L, V), top_k, top_p, order)


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
    """Small rows with few levels, so that every boundary is in a tie. Tokens and their frequencies are the host's."""
    host, V, draws = host_kernels(config(40), block=32), 40, 32
    rng = np.random.default_rng(0)
    for _ in range(60):
        row = rng.choice(np.array([0, -0.0, -0.5, -1, -1, -3, -20, -40, -INF], np.float32), V)
        row[rng.integers(V)] = 0
        top_k, top_p = int(rng.integers(0, V + 1)), float(rng.choice([0.0, 1e-300, 0.1, 0.5, 0.9, 0.999, rng.random()]))
        assert_equal(host, np.tile(row, (1, draws, 1)), top_k, top_p)


def test_a_draw_on_a_boundary_takes_the_next_token(host_kernels: Build) -> None:
    for image in (5, 2**33):
        logits, token = row_on_a_boundary(512, image)
        tokens, _ = kernel_tokens(host_kernels(config(512), block=64), logits, [image], 0, 0.0)
        assert tokens.tolist() == host_tokens(logits, [image], 0, 0.0).tolist() == [[token]]


def test_the_ends_of_the_cdf(host_kernels: Build) -> None:
    """Images whose first draw is among the smallest and largest of a million."""
    counter = np.zeros((10**6, 4), np.uint32)
    counter[:, 1], counter[:, 2] = SCALE, np.arange(10**6)
    order = np.argsort(noise.philox4x32(counter, (SEED & 0xFFFFFFFF, SEED >> 32))[:, 0])
    images = [int(i) for i in (*order[:20], *order[-20:])]
    smallest, largest = (int(noise.draws(SEED, i, SCALE, 1)[0]) for i in (images[0], images[-1]))
    assert smallest < 100 and largest > 2**24 - 100
    logits = np.zeros((40, 1, 4096), np.float32)
    for top_p in (0.0, 0.6):
        tokens, _ = kernel_tokens(host_kernels(config(4096), block=64), logits, images, 0, top_p, one_seed=True)
        assert np.array_equal(tokens, host_tokens(logits, images, 0, top_p, one_seed=True))
        assert (tokens.min() == 0) == (top_p == 0.0) and tokens.max() == 4095


def test_order_of_threads_does_not_matter(host_kernels: Build) -> None:
    host, logits = host_kernels(config(512), block=128), make_rows(1, 1, 10, 512)
    for order, (top_k, top_p) in itertools.product(range(6), [(50, 0.95), (0, 0.5), (50, 0.0)]):
        assert_equal(host, logits, top_k, top_p, order)


def test_no_spread_of_logits_is_searched_bit_by_bit(host_kernels: Build) -> None:
    """That search takes many times as long. It is for rows that are nearly flat, such as the last one here."""
    host = host_kernels(config(8912), block=256, source=mutated("return answer;", "return 0;"))
    rng = np.random.default_rng(0)
    for spread in (0.5, 1, 4, 8, 17, 40, 1000):
        logits = (rng.standard_normal((2, 2, 8912)) * spread).astype(np.float32)
        assert_equal(host, logits, 900, 0.95)
    with pytest.raises(AssertionError):
        assert_equal(host, np.zeros((2, 2, 8912), np.float32), 900, 0.95)


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
    out = np.zeros(len(differences), np.int64)
    args = differences.ctypes.data, out.ctypes.data, ctypes.c_uint32(len(out))
    host.run(Launch("weights", (-(-len(out) // 256), 1, 1), (256, 1, 1), 0, args))
    return out


def differences() -> Float32:
    rng = np.random.default_rng(0)
    bits = rng.integers(0x80000000, 0xC2000000, 100_000, dtype=np.uint32).view(np.float32)  # -0 to -32, every exponent
    edges = np.array([0, -0.0, -INF, -28, -27.75, -3e38, -1e-45, *(k * -np.log(2) for k in range(42))], np.float32)
    return np.concatenate([-rng.random(100_000, np.float32) * 30, bits, edges, np.nextafter(edges, np.float32(-1))])


def test_weights_equal_the_host(host_kernels: Build) -> None:
    x, source = differences(), kernel_source() + WEIGHTS
    scaled = sampling._scaled_exp(x)
    assert np.array_equal(weights_of(host_kernels(config(64), source=source), x), scaled.astype(np.int64))
    product = "__dmul_rn(p, __longlong_as_double((long long)(exponent << 52)))"
    source = mutated(product, f"__double_as_longlong({product})", source)
    assert np.array_equal(weights_of(host_kernels(config(64), source=source), x).view(np.float64), scaled)
    source = mutated("__dadd_rn(__dmul_rn(__dmul_rn(p, r), r), r)", "fma(__dmul_rn(p, r), r, r)", source)
    fused = weights_of(host_kernels(config(64), source=source), x).view(np.float64)
    assert not np.array_equal(fused, scaled)  # a compiler that fuses operations would give this


# --- refusals


@pytest.mark.parametrize("bad", [[NAN], [-NAN], [INF], [-INF], [NAN, INF], [NAN, -INF]])
def test_rows_without_a_finite_maximum_are_refused(bad: list[float], host_kernels: Build) -> None:
    logits, images = make_rows(0, 3, 10, 97), indices(3)
    expected = host_tokens(logits, images, 50, 0.95)
    for image, position in [(0, 4), (1, 3), (2, 9)]:  # the status has the first
        if bad == [-INF]:
            logits[image, position] = -INF
        else:
            logits[image, position, 96 : 96 - len(bad) : -1] = bad
        expected[image, position] = 0
    for order, (top_k, top_p) in enumerate([(50, 0.95), (0, 0.0), (1, 0.95)]):
        tokens, refusal = kernel_tokens(host_kernels(config(97)), logits, images, top_k, top_p, order=order)
        assert refusal == Refusal("logits", SCALE, 4)
        if (top_k, top_p) == (50, 0.95):
            assert np.array_equal(tokens, expected)  # the other rows do not change


def test_the_status_has_the_first_refused_scale(host_kernels: Build) -> None:
    host, status = host_kernels(config(97)), np.zeros(STATUS_WORDS, np.uint32)
    for scale, row in [(5, 0), (2, 7), (2, 3), (4, 1)]:
        logits = make_rows(0, 1, 10, 97)
        logits[0, row, 5] = NAN
        arrays = logits, stream_block([SEED], [0]), np.zeros((1, 10), np.int32), status, *option_words(0, 0.0, 97)
        host.run(kernels.sample_rows(*map(device_array, arrays), scale=scale))
    assert read_status(status) == Refusal("logits", 2, 3)


# --- negative controls


@pytest.mark.kernels
def test_wrong_kernels_are_noticed(tmp_path: Path) -> None:
    """Some row and some order of threads needs every rule and every barrier."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    program = [sys.executable, str(Path(sampling_proof.__file__)), str(tmp_path)]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    noticed: dict[str, bool] = json.loads(run.stdout)
    assert len(noticed) > 20 and noticed == {mutant: mutant != sampling_proof.RIGHT for mutant in mutants()}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  if (kept == 1) return;", "  if (kept == 1 || thread == 40) return;", r"thread|lane"),
        ("    moved = needed < ITEMS", "    if (warp) __syncthreads();\n    moved = needed < ITEMS", r"barrier"),
        (
            "    moved = needed < ITEMS",
            "    if (lane) __ballot_sync(ALL_LANES, 1);\n    moved = needed < ITEMS",
            r"lane",
        ),
    ],
)
def test_threads_that_do_not_meet_are_an_error(old: str, new: str, message: str, host_kernels: Build) -> None:
    host = host_kernels(config(512), block=64, source=mutated(old, new))
    with pytest.raises(KernelFailed, match=message):
        kernel_tokens(host, make_rows(0, 1, 3, 512), [0], 50, 0.95)
    with pytest.raises(KernelFailed, match=message):  # a second run is not affected by the first
        kernel_tokens(host, make_rows(0, 1, 3, 512), [0], 50, 0.95)
