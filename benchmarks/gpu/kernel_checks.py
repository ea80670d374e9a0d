"""Compares the kernels of the sampling loop with the host, and those of the network's layers with float64.

python -m flexvar_bench.gpu.kernel_checks

The data is small, because compute-sanitizer is slow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np

from flexvar_runtime.cuda import kernels
from flexvar_runtime.cuda.kernels import KernelConfig
from flexvar_runtime.model.noise import draws_of_images
from flexvar_runtime.model.resize import bicubic_matrix
from flexvar_runtime.model.sampling import sample
from flexvar_runtime.pictures.pixels import to_uint8

from .kernel_harness import KernelHarness
from .layer_checks import layer_checks
from .sampler_checks import upload_options

CONFIG = KernelConfig(512, 8, 128)  # of the tiny model
SEEDS, INDICES = (2**63, 7, 2**63), (0, 5, 2**32)
OPTIONS = ((900, 0.95), (0, 0.0), (1, 0.95), (50, 0.9))  # top_k, top_p
INPUT_TOLERANCE = 1e-4  # next inputs are sums of 16 float32 products of unit size


def kernel_checks(harness: KernelHarness) -> dict[str, bool]:
    """Whether each check of the kernels around the network holds, by its name."""
    found: dict[str, bool] = {}
    checks: tuple[Callable[[KernelHarness, np.random.Generator], Iterator[tuple[str, bool]]], ...] = (
        _draws,
        _tokens,
        _next_inputs,
        _rows,
        _pixels,
    )
    harness.load(CONFIG)
    for check in checks:
        found.update(check(harness, harness.rng))
    harness.release()
    return found


def _draws(harness: KernelHarness, _: np.random.Generator) -> Iterator[tuple[str, bool]]:
    streams = harness.upload(kernels.stream_block(SEEDS, INDICES))
    for i, length in enumerate((1, 9, 257)):
        out = harness.empty((len(INDICES), length), "uint32")
        got = harness.run(kernels.draws(streams, out, scale=i), out)
        yield f"draws {length}", np.array_equal(got.reshape(-1), draws_of_images(SEEDS, INDICES, i, length))


def _tokens(harness: KernelHarness, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    streams, status = harness.upload(kernels.stream_block(SEEDS, INDICES)), harness.status()
    for h, w in ((1, 1), (3, 5)):
        for top_k, top_p in OPTIONS:
            noise = draws_of_images(SEEDS, INDICES, 2, h * w)
            logits = (4 * rng.standard_normal((len(INDICES), h * w, CONFIG.vocabulary))).astype(np.float32)
            out = harness.empty((len(INDICES), h, w), "int32")
            options = upload_options(harness.arrays, top_k, top_p, CONFIG.vocabulary)
            launch = kernels.sample_rows(harness.upload(logits), streams, out, status, *options, scale=2)
            got = harness.run(launch, out)
            host = sample(logits.reshape(-1, CONFIG.vocabulary), noise, top_k=top_k, top_p=top_p)
            yield f"sample_rows {h}x{w} top_k {top_k} top_p {top_p}", np.array_equal(got.reshape(-1), host)
    yield "sample_rows sets no error flag", kernels.read_status(harness.download(status)) is None


def _next_inputs(harness: KernelHarness, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    B, (h, w), (H, W), V, D, C = 2, (3, 2), (5, 4), CONFIG.vocabulary, CONFIG.code_dim, CONFIG.width
    tokens = rng.integers(0, V, (B, h, w)).astype(np.int32)
    codebook = rng.standard_normal((V, D)).astype(np.float32)
    positions = rng.standard_normal((H * W, C)).astype(np.float32)
    rows, columns = bicubic_matrix(h, H), bicubic_matrix(w, W)
    codes, offset = harness.empty((2 * B, H * W, D), "float32"), harness.empty((2 * B, H * W, C), "float32")
    launch = kernels.next_inputs(
        harness.upload(tokens),
        harness.upload(codebook),
        harness.upload_pair(kernels.taps(rows)),
        harness.upload_pair(kernels.taps(columns)),
        harness.upload(positions),
        codes,
        offset,
    )
    got = harness.run(launch, codes)
    exact = [matrix.astype(np.float64) for matrix in (rows, columns, codebook[tokens])]
    want = np.einsum("yh,xw,bhwd->byxd", *exact).reshape(B, H * W, D)
    close = np.allclose(got[:B], want, atol=INPUT_TOLERANCE)
    yield "next_inputs codes, both branches", bool(close) and np.array_equal(got[:B], got[B:])
    expected = np.broadcast_to(positions, (2 * B, H * W, C))
    yield "next_inputs offsets", np.array_equal(harness.download(offset), expected)


def _rows(harness: KernelHarness, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    source, rows = rng.standard_normal((14, 7, 1, CONFIG.width)).astype(np.float32), np.array([6, 0, 3], np.int32)
    target = harness.empty((14, 3, 1, CONFIG.width), "float32")
    got = harness.run(kernels.gather_rows(harness.upload(source), harness.upload(rows), target), target)
    yield "gather_rows", np.array_equal(got, source[:, rows])
    before = rng.standard_normal((14, 9, 1, CONFIG.width)).astype(np.float32)
    target, expected = harness.upload(before), before.copy()
    expected[:, rows] = source[:, :3]
    got = harness.run(kernels.scatter_rows(harness.upload(source), harness.upload(rows), target), target)
    yield "scatter_rows", np.array_equal(got, expected)


def _pixels(harness: KernelHarness, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    image = (1.5 * rng.standard_normal((2, 3, 33, 31))).astype(np.float32)
    pixels, status = harness.empty((2, 33, 31, 3), "uint8"), harness.status()
    got = harness.run(kernels.to_uint8(harness.upload(image), pixels, status), pixels)
    yield "to_uint8", np.array_equal(got, to_uint8(image))
    image = image.copy()
    image[1, 2, 5, 5] = np.nan
    harness.run(kernels.to_uint8(harness.upload(image), pixels, status), pixels)
    yield "to_uint8 sets the error flag for NaN", kernels.read_status(harness.download(status)) is not None


def main() -> int:
    harness = KernelHarness()
    lines = [(name, holds, "") for name, holds in kernel_checks(harness).items()]
    lines += [(check.name, check.holds, f"{check.error:.3g}") for check in layer_checks(harness)]
    harness.close()
    wrong = [line for line in lines if not line[1]]
    for name, _, error in wrong:
        print(f"BAD {name} {error}", flush=True)
    print(f"{len(lines) - len(wrong)} of {len(lines)} checks hold", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
