"""Compares the kernels of the network's layers with float64. Results begin as NaN.

The bounds are those of tests/runtime/cuda: one rounding to the type of the result, and sums in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flexvar_runtime.cuda import layers
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.layers import Branch, LayerConfig

from .attention_checks import attention_checks
from .kernel_harness import Array, Check, KernelHarness, largest_error, relative_error

ERROR = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 3e-6}  # relative
FLOAT32 = "float32"
D16 = (1024, 16, 32)  # width, heads, code dimension
CONFIGS = (
    LayerConfig("float16", *D16),
    LayerConfig("bfloat16", *D16),
    LayerConfig("bfloat16", 192, 6, 8),  # one warp with idle lanes, heads of 32
    LayerConfig("float16", 2304, 18, 8),  # more vectors than threads, heads of 128
)
SMALL_CONFIGS = (LayerConfig("float16", 128, 2, 8), LayerConfig("bfloat16", 192, 6, 8))  # for an emulated device
MAPS = ((1, 1, 1, 8, 1), (2, 3, 5, 32, 32), (3, 16, 16, 64, 32), (1, 2, 3, 2048, 64))  # B, H, W, C and groups
LARGE_MAPS = ((2, 65, 127, 128, 32), (3, 31, 33, 512, 32))
SEQUENCES = ((2, 1), (3, 7))  # sequences, and new tokens of each


def layer_checks(harness: KernelHarness, *, small: bool = False) -> Iterator[Check]:
    """The checks of every kernel in several configurations. small: fewer of them, for an emulated device."""
    for config in SMALL_CONFIGS if small else CONFIGS:
        harness.load(config)
        name = f"{config.half} {config.width}"
        checks = _Checks(harness, config)
        for check in (*checks.rows(), *checks.maps(small=small), *attention_checks(harness, config, small=small)):
            yield Check(f"{check.name} {name}", check.error, check.bound)
        yield Check(f"memory around arrays {name}", harness.changed_guards(), 0)
        harness.release()


class _Checks:
    """The checks of one configuration. N: sequences, L: new tokens, C: width, B: images."""

    def __init__(self, harness: KernelHarness, config: LayerConfig) -> None:
        self.harness, self.config, self.half = harness, config, config.half

    def _close(self, name: str, result: DeviceArray, expected: Array) -> Check:
        got = self.harness.values(result).reshape(expected.shape)
        return Check(name, relative_error(got, expected), ERROR[result.dtype])

    def _equal(self, name: str, result: DeviceArray, expected: Array) -> Check:
        return Check(name, largest_error(self.harness.values(result).reshape(expected.shape), expected), 0)

    def rows(self) -> Iterator[Check]:
        """The kernels of the transformer, except attention."""
        for N, L in SEQUENCES:
            for wide in (False, True):
                yield from self._modulate(N, L, wide, with_branch=False)
                yield from self._modulate(N, L, wide, with_branch=True)
                yield from self._split(N, L, wide)
            yield from self._guide(N, L)
        for rows in (1, 7, 64):
            yield self._embed(rows)
        yield from self._class_rows()

    def _modulation(self, N: int) -> tuple[DeviceArray, Array]:
        return self.harness.normal(N, 1, self.config.width, scale=0.3)

    def _modulate(self, N: int, L: int, wide: bool, *, with_branch: bool) -> Iterator[Check]:
        harness, C, dtype = self.harness, self.config.width, FLOAT32 if wide else self.half
        stream, x = harness.normal(N, L, C, scale=3)
        (gamma, g), (scale, s), (shift, b) = (self._modulation(N) for _ in range(3))
        branch, y = harness.normal(N, L, C, dtype=dtype)
        result = harness.nan(N, L, C, dtype=dtype)
        added = Branch(branch, gamma) if with_branch else None
        harness.launch(layers.modulate_rows(stream, added, scale, shift, result))
        x = x + y * g if with_branch else x
        name = f"modulate_rows {N}x{L} to {dtype}{' + branch' if with_branch else ''}"
        yield self._close(name, result, _normed(x) * (1 + s) + b)
        yield self._close(f"{name}, stream", stream, x)

    def _guide(self, B: int, L: int) -> Iterator[Check]:
        harness, C = self.harness, self.config.width
        stream, x = harness.normal(2 * B, L, C)
        (gamma, g), (scale, s), (shift, b) = (self._modulation(2 * B) for _ in range(3))
        branch, y = harness.normal(2 * B, L, C, dtype=self.half)
        t, weights = harness.normal(B)
        cond = np.arange(B, dtype=np.int32)[::-1].copy()
        rows, result = harness.upload_pair((cond, cond + np.int32(B))), harness.nan(B, L, C, dtype=self.half)
        harness.launch(layers.guide_rows(stream, Branch(branch, gamma), scale, shift, rows, t, result))
        z = _normed(x + y * g) * (1 + s) + b
        expected = z[cond] + weights[:, None, None] * (z[cond] - z[cond + B])
        yield self._close(f"guide_rows {B}x{L}", result, expected)
        yield self._equal(f"guide_rows {B}x{L}, stream", stream, x)

    def _split(self, N: int, L: int, wide: bool) -> Iterator[Check]:
        """The cache has 5 tokens before the new ones, and 2 behind them."""
        harness, C, H = self.harness, self.config.width, self.config.heads
        S, dtype = C // H, FLOAT32 if wide else self.half
        joined, x = harness.normal(N, L, 3 * C, dtype=dtype)
        temperature, t = harness.normal(H, scale=4)
        queries = harness.nan(N, L, C, dtype=dtype)
        caches = [harness.nan(5 + L + 2, N, H, S, dtype=self.half) for _ in range(2)]
        harness.launch(layers.split_heads(joined, temperature, queries, *(cache[5 : 5 + L] for cache in caches)))
        q, k, v = (part.reshape(N, L, H, S) for part in np.split(x, 3, -1))
        q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
        name = f"split_heads {N}x{L} in {dtype}"
        yield self._close(f"{name}, queries", queries, q * t[:, None])
        for part, cache, expected in (("keys", caches[0], k), ("values", caches[1], v)):
            yield self._close(f"{name}, {part}", cache[5 : 5 + L], expected.transpose(1, 0, 2, 3))
            around = np.concatenate([harness.values(cache[:5]), harness.values(cache[5 + L :])])
            yield Check(f"{name}, other {part}", int((~np.isnan(around)).sum()), 0)

    def _embed(self, rows: int) -> Check:
        harness, C, D = self.harness, self.config.width, self.config.code_dim
        (codes, c), (weight, w), (offset, o) = harness.normal(rows, D), harness.normal(D, C), harness.normal(rows, C)
        stream = harness.nan(rows, C, dtype=FLOAT32)
        harness.launch(layers.embed(codes, weight, offset, stream))
        return self._close(f"embed {rows}", stream, c @ w + o)

    def _class_rows(self) -> Iterator[Check]:
        harness, C = self.harness, self.config.width
        (embedding, e), (mean, m), (start, s) = harness.normal(11, C), harness.normal(C), harness.normal(1, 1, C)
        labels = np.array([10, 0, 3, 3], np.int32)
        hidden, first = harness.nan(4, C, dtype=self.half), harness.nan(4, 1, C, dtype=FLOAT32)
        harness.launch(layers.class_rows(harness.upload(labels), embedding, mean, start, hidden, first))
        chosen = e[labels]
        yield self._close("class_rows, hidden", hidden, _silu(chosen) - m)
        yield self._close("class_rows, first", first, chosen[:, None] + s)

    # --- maps

    def maps(self, *, small: bool) -> Iterator[Check]:
        """The kernels of the tokenizer."""
        for sizes in MAPS if small else MAPS + LARGE_MAPS:
            for wide, silu in ((False, True), (True, False)):
                yield from self._norms(*sizes, wide=wide, silu=silu)
        yield from self._look_up_and_double()
        for columns, stride in ((1, 8), (15, 16), (300, 304)):
            yield from self._softmax(columns, stride)
        yield from self._im2col((5, 7), 3, 1, 1, (5, 7))
        yield from self._im2col((6, 8), 3, 2, 0, (3, 4))
        yield from self._im2col((4, 3), 1, 1, 0, (4, 3))
        for dtype in (self.half, FLOAT32):
            yield from self._planes_and_sums(dtype)

    def _norms(self, B: int, H: int, W: int, C: int, groups: int, *, wide: bool, silu: bool) -> Iterator[Check]:
        harness = self.harness
        x, exact = harness.normal(B, H, W, C, dtype=FLOAT32 if wide else self.half, mean=2)
        (gain, g), (bias, b) = harness.normal(C), harness.normal(C)
        partial = harness.nan(B, layers.MOST_CHUNKS, groups, 2, dtype=FLOAT32)
        statistics, finished = harness.nan(B, groups, 2, dtype=FLOAT32), harness.upload(np.zeros(B, np.uint32))
        y = harness.nan(B, H, W, C, dtype=self.half)
        harness.launch(layers.group_statistics(x, partial, finished, statistics))
        first = harness.download(statistics)
        harness.launch(layers.group_statistics(x, partial, finished, statistics))
        harness.launch(layers.group_normalise(x, statistics, gain, bias, y, silu=silu))
        grouped = exact.reshape(B, H * W, groups, C // groups)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        variance = (centred**2).mean((1, 3), keepdims=True)
        expected = (centred / np.sqrt(variance + 1e-6)).reshape(B, H, W, C) * g + b
        name = f"group norm {B}x{H}x{W}x{C} of {x.dtype}"
        yield self._close(name, y, _silu(expected) if silu else expected)
        yield Check(f"{name}, counters", int(np.count_nonzero(harness.download(finished))), 0)
        yield self._equal(f"{name}, again", statistics, first.astype(np.float64))

    def _look_up_and_double(self) -> Iterator[Check]:
        harness, D = self.harness, self.config.code_dim
        codebook, codes = harness.normal(97, D, dtype=self.half)
        tokens = harness.rng.integers(0, 97, (2, 3, 5)).astype(np.int32)
        x, y = harness.nan(2, 3, 5, D, dtype=self.half), harness.nan(2, 6, 10, D, dtype=self.half)
        harness.launch(layers.look_up(harness.upload(tokens), codebook, x))
        yield self._equal("look_up", x, codes[tokens])
        harness.launch(layers.double_map(x, y))
        yield self._equal("double_map", y, codes[tokens].repeat(2, 1).repeat(2, 2))

    def _softmax(self, columns: int, stride: int) -> Iterator[Check]:
        scores, x = self.harness.normal(3, 5, stride, scale=20)
        out = self.harness.nan(3, 5, stride, dtype=self.half)
        self.harness.launch(layers.softmax_rows(scores, out, columns))
        weights = np.exp(x[..., :columns] - x[..., :columns].max(-1, keepdims=True))
        expected = np.zeros_like(x)
        expected[..., :columns] = weights / weights.sum(-1, keepdims=True)
        yield self._close(f"softmax_rows {columns} of {stride}", out, expected)
        behind = self.harness.values(out)[..., columns:]
        yield Check(f"softmax_rows {columns} of {stride}, rest", int(np.count_nonzero(behind)), 0)

    def _im2col(
        self, size: tuple[int, int], side: int, stride: int, padding: int, out_size: tuple[int, int]
    ) -> Iterator[Check]:
        (H, W), (out_h, out_w) = size, out_size
        for dtype, planar in ((self.half, False), (FLOAT32, True)):
            source, x = self.harness.normal(*((2, 8, H, W) if planar else (2, H, W, 8)), dtype=dtype)
            padded = np.zeros((2, padding + out_h * stride + side, padding + out_w * stride + side, 8))
            padded[:, padding : padding + H, padding : padding + W] = x.transpose(0, 2, 3, 1) if planar else x
            length = side * side * 8 + 3
            columns = self.harness.nan(2 * out_h * out_w, length, dtype=dtype)
            kernel, corner = (side, side), (padding, padding)
            self.harness.launch(
                layers.im2col(
                    source, columns, kernel=kernel, stride=stride, padding=corner, out_size=out_size, planar=planar
                )
            )
            taps = [
                padded[:, r : r + out_h * stride : stride, s : s + out_w * stride : stride]
                for r in range(side)
                for s in range(side)
            ]
            expected = np.zeros(columns.shape)
            expected[:, : length - 3] = np.concatenate(taps, -1).reshape(len(expected), -1)
            yield self._equal(f"im2col {side}x{side} stride {stride} of {dtype}", columns, expected)

    def _planes_and_sums(self, dtype: str) -> Iterator[Check]:
        harness, shape = self.harness, (2, 17, 19, 8)
        (x, exact), (added, b) = harness.normal(*shape, dtype=dtype), harness.normal(*shape, dtype=self.half)
        planes = harness.nan(2, 3, 17, 19, dtype=FLOAT32)
        harness.launch(layers.to_planes(x, planes))
        yield self._equal(f"to_planes of {dtype}", planes, exact.transpose(0, 3, 1, 2)[:, :3])
        for out_dtype in (self.half, FLOAT32):
            out = harness.nan(*shape, dtype=out_dtype)
            harness.launch(layers.add_maps(x, added, out))
            yield self._close(f"add_maps of {dtype} to {out_dtype}", out, exact + b)
            harness.launch(layers.add_maps(x, None, out))
            yield self._close(f"add_maps of {dtype} alone to {out_dtype}", out, exact)


def _normed(x: Array) -> Array:
    centred: Array = x - x.mean(-1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return normed


def _silu(x: Array) -> Array:
    result: Array = x / (1 + np.exp(-x))
    return result
