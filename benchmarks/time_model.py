"""A time model of the backend `cuda`: every launch of a captured generation, its least time and its expected time.

The least time of a launch, its bound, is the longer of two: its bytes at the bandwidth of large copies, and its
operations at the rate of large products. Bytes that are still in the L2 cache can be read faster than that.

The expected time uses measured times of an H200:

- Products and convolutions of d16's shapes: their times in RESULTS. Between two measured sizes it interpolates.
- Other products and convolutions, and other GPUs: a line through those times, with the bound as a variable.
- Our own kernels: times of equal kernels in the sketch of 2026-11-27 (benchmarks/LOG.md).

Parts of blocks that a bundle keeps in float32 are not modelled: everything is in half precision.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.backends.cuda.autoencoder_weights import OUTPUT_CHANNELS
from flexvar_runtime.cuda.attention import FEW_TOKENS
from flexvar_runtime.cuda.layers import chunks
from flexvar_runtime.memory.plan import IMAGES_PER_RUN
from flexvar_runtime.model.facts import ModelFacts

HALF, FLOAT = 2, 4  # bytes
MODULATIONS = 6  # of a block
TRANSFORMER, SAMPLING, DECODER = "transformer", "sampling", "decoder"
RESULTS = Path(__file__).parent / "results" / "libraries_nvidia-h200_2026-11-28.json"

# Microseconds of an H200. Sources: the sketch of 2026-11-27, RESULTS, and for draws the sampler's own times in
# gpu_nvidia-h200_2026-11-28.json (logits of deviation 4).
NODE_US = 0.63  # of each launch, between different kernels: the sketch's graph (6.71 ms) less its parts, over 1,319
ROW_US, GUIDE_US = 1.9, 2.9  # of a kernel with few rows; of `embed` and `guide_rows`
ATTENTION_US, TILE_US, LONE_TILE_US = 2.4, 0.44, 0.57  # a tile of 64 x 64 on a full and on an empty multiprocessor
FIRST_DRAWS_US, MORE_DRAWS_US = 9.6, 8.6  # of `sample_rows`: a row on every multiprocessor, and each further one
PRODUCT_US = 3.1, 0.00073, 1.12  # fitted to 150 products: once, for each number summed, and times the bound
CONVOLUTION_US = 2.7, 0.00175, 1.09  # the same for 60 convolutions
CHUNK_US = 0.005  # assumed: the last block of `group_statistics` adds up parts from the L2 cache, 32 at a time
COPY_US, LINK = 1.5, 50e9  # assumed: a copy or a fill without a kernel; bytes a second to the host
CACHED, STREAMED = 1.17, 0.91  # bandwidth of our kernels, as shares of that of a copy: within the L2 cache, and beyond
LONG_US, LONG_FACTOR = 25_000.0, 1.08  # a longer graph takes more than its parts: 88.6 ms of the sketch, parts of 81


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes a second of a large copy. rate: operations a second of a large product in half precision.

    cache_bytes: of the L2 cache. measured: whether RESULTS are from this GPU.
    """

    name: str
    bandwidth: float
    rate: float
    multiprocessors: int
    cache_bytes: float
    measured: bool = False


def _by_data_sheet(name: str, bandwidth: float, rate: float, multiprocessors: int, cache_bytes: float) -> Gpu:
    """A GPU that reaches the same shares of its vendor's figures as the H200: 4.27 of 4.8 TB/s, 750 of 989 TFLOP/s."""
    return Gpu(name, bandwidth * 4.27 / 4.8, rate * 750 / 989, multiprocessors, cache_bytes)


GPUS = {
    "h200": Gpu("NVIDIA H200", 4.27e12, 750e12, 132, 50e6, measured=True),
    # NVIDIA's data sheets: memory bandwidth, and dense fp16 with sums in float32
    "h100": _by_data_sheet("NVIDIA H100 SXM 80 GB", 3.35e12, 989e12, 132, 50e6),
    "a100": _by_data_sheet("NVIDIA A100 SXM 80 GB", 2.039e12, 312e12, 108, 40e6),
    "rtx4090": _by_data_sheet("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12, 128, 72e6),
}


@dataclass(frozen=True)
class Decoder:
    """Sizes of a tokenizer's decoder. multipliers: of the channels, from the largest map to the smallest."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    latent: int = 256


@dataclass(frozen=True)
class Work:
    """A launch, or several of one kind.

    name: of the operation, as in `Operation.name`. part: of the generation. kind: what launches of one sort have in
    common; of a convolution its shape.
    read, written: bytes. us, bound_us: expected and least time in microseconds. sizes: M, N and K of a product.
    """

    name: str
    part: str
    kind: str
    count: int
    read: float
    written: float
    flops: float
    us: float
    bound_us: float
    sizes: tuple[int, ...] = ()


def generation(
    model: ModelFacts, decoder: Decoder, schedule: ScaleSchedule, images: int, gpu: Gpu, *, guided: bool = True
) -> list[Work]:
    """Every launch of a generation in order: one `gather_rows` for the conditions, then the captured graph."""
    parts = [min(IMAGES_PER_RUN, images - start) for start in range(0, images, IMAGES_PER_RUN)]
    loop = _Loop(gpu, model, images, images * (2 if guided else 1))
    works = [*loop.begin(), *loop.scales(schedule)]
    for part in parts:
        works += _Maps(gpu, decoder, model, part).decode(schedule[-1])
    pixels = 3 * images * schedule[-1][0] * schedule[-1][1] * model.downsampling**2
    result = pixels + 4 * images * sum(h * w for h, w in schedule)  # pixels and the tokens of every scale
    works.append(loop.moved("read", SAMPLING, result, result, COPY_US + 1e6 * result / LINK))
    if sum(work.us for work in works) < LONG_US:
        return works
    return [work if work.part == SAMPLING else replace(work, us=work.us * LONG_FACTOR) for work in works]


def by_kind(works: Sequence[Work]) -> list[Work]:
    """The sum of each kind, the most expensive first."""
    groups: dict[tuple[str, str], list[Work]] = {}
    for work in works:
        groups.setdefault((work.part, work.kind), []).append(work)
    sums = [total(kind, part, group) for (part, kind), group in groups.items()]
    return sorted(sums, key=lambda work: -work.us)


def total(name: str, part: str, works: Sequence[Work]) -> Work:
    """The sum of some launches."""
    columns = zip(*((w.count, w.read, w.written, w.flops, w.us, w.bound_us) for w in works), strict=True)
    count, *sums = (sum(column) for column in columns)
    return Work(name, part, name, int(count), *sums)


class _Maker:
    """Makes the launches that the parts of a generation share."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def bound_us(self, moved: float, flops: float) -> float:
        return 1e6 * max(moved / self.gpu.bandwidth, flops / self.gpu.rate)

    def moved(self, name: str, part: str, read: float, written: float, us: float, flops: float = 0.0) -> Work:
        """A launch that takes `us` beside the time between launches."""
        bound = self.bound_us(read + written, flops)
        return Work(name, part, name, 1, read, written, flops, us + NODE_US, bound)

    def kernel(self, name: str, part: str, read: float, written: float, us: float = ROW_US) -> Work:
        """A kernel of ours that only moves bytes. us: of its least launch."""
        share = CACHED if read + written <= self.gpu.cache_bytes else STREAMED
        return self.moved(name, part, read, written, us + 1e6 * (read + written) / (share * self.gpu.bandwidth))

    def product(
        self,
        name: str,
        part: str,
        sizes: tuple[int, int, int],
        *,
        batch: int = 1,
        bias: bool = True,
        wide: bool = False,
    ) -> Work:
        """sizes: M, N and K. wide: whether the result and the bias are float32."""
        (M, N, K), out = sizes, FLOAT if wide else HALF
        read, written = batch * HALF * K * (M + N) + bias * out * N, batch * out * M * N
        flops = 2.0 * batch * M * N * K
        bound = self.bound_us(read + written, flops)
        us = self._measured(f"product {K}x{N}", M) or _line(PRODUCT_US, K, bound)
        kind = f"product {name.rsplit('.', 1)[-1]}"
        return Work(f"product {name}", part, kind, 1, read, written, flops, us + NODE_US, bound, sizes)

    def convolution(
        self, name: str, image: tuple[int, int, int, int], outputs: int, side: int, *, residual: bool = False
    ) -> Work:
        """image: (B, H, W, I). side: of the kernel."""
        B, H, W, inputs = image
        K, pixels = side * side * inputs, B * H * W
        read = HALF * (pixels * inputs + K * outputs + outputs + residual * pixels * outputs)
        written, flops = HALF * pixels * outputs, 2.0 * pixels * outputs * K
        bound = self.bound_us(read + written, flops)
        shape = f"{side}x{side} {inputs}>{outputs} @{W}{' +res' if residual else ''}"
        us = (H == W and self._measured(shape, B)) or _line(CONVOLUTION_US, K, bound)
        sizes = (pixels, outputs, K)
        return Work(f"convolution {name}", DECODER, shape, 1, read, written, flops, us + NODE_US, bound, sizes)

    def _measured(self, shape: str, size: int) -> float | None:
        """The measured time of a shape, between neighbouring sizes; None where it was not measured."""
        found = measured_us().get(shape, {}) if self.gpu.measured else {}
        if not found or not min(found) <= size <= max(found):
            return None
        return float(np.interp(size, list(found), list(found.values())))


class _Loop(_Maker):
    """The sampling loop and the transformer."""

    def __init__(self, gpu: Gpu, model: ModelFacts, images: int, sequences: int) -> None:
        super().__init__(gpu)
        self.model, self.images, self.sequences = model, images, sequences

    def begin(self) -> Iterator[Work]:
        """The conditions of the classes: modulations of all blocks and the head, and the first input."""
        conditions = FLOAT * (MODULATIONS * self.model.depth + 3) * self.sequences * self.model.width
        yield self.kernel("gather_rows", SAMPLING, conditions, conditions)
        yield self.moved("zero", SAMPLING, 0, 8, COPY_US)  # the error flag

    def scales(self, schedule: ScaleSchedule) -> Iterator[Work]:
        past = 0
        for before, (h, w) in pairwise([None, *schedule]):
            if before is not None:
                yield self._next_inputs(before[0] * before[1], h * w)
            yield from self._step(h * w, past)
            yield self._sample_rows(h * w)
            past += h * w

    def _next_inputs(self, before: int, new: int) -> Work:
        D, C, B, N = self.model.code_dim, self.model.width, self.images, self.sequences
        codebook = FLOAT * D * min(self.model.vocabulary, B * before)
        read = 4 * B * before + codebook + FLOAT * C * new
        return self.kernel("next_inputs", SAMPLING, read, FLOAT * N * new * (D + C))

    def _sample_rows(self, new: int) -> Work:
        rows = self.images * new
        turns = -(-rows // self.gpu.multiprocessors)
        us = FIRST_DRAWS_US + (turns - 1) * MORE_DRAWS_US
        return self.moved("sample_rows", SAMPLING, FLOAT * rows * self.model.vocabulary, 4 * rows, us)

    def _step(self, new: int, past: int) -> Iterator[Work]:
        C, V, D, M = self.model.width, self.model.vocabulary, self.model.code_dim, self.sequences * new
        yield self.kernel("embed", TRANSFORMER, FLOAT * (M * D + D * C + M * C), FLOAT * M * C, GUIDE_US)
        for i in range(self.model.depth):
            block = f"blocks.{i}"
            yield self._modulate_rows(M, adds=i > 0)
            yield self.product(f"{block}.qkv", TRANSFORMER, (M, 3 * C, C))
            yield self.kernel("split_heads", TRANSFORMER, HALF * 3 * M * C + FLOAT * self.model.heads, HALF * 3 * M * C)
            yield self._attention(new, past + new)
            yield self.product(f"{block}.proj", TRANSFORMER, (M, C, C))
            yield self._modulate_rows(M, adds=True)
            yield self.product(f"{block}.fc1", TRANSFORMER, (M, 4 * C, C))
            yield self.product(f"{block}.fc2", TRANSFORMER, (M, C, 4 * C))
        rows = self.images * new
        read = (FLOAT + HALF) * M * C + FLOAT * 3 * self.sequences * C
        yield self.kernel("guide_rows", TRANSFORMER, read, HALF * rows * C, GUIDE_US)
        yield self.product("head", TRANSFORMER, (rows, V, C), wide=True)

    def _modulate_rows(self, M: int, *, adds: bool) -> Work:
        """adds: whether it first adds the branch before it to the stream."""
        C, N = self.model.width, self.sequences
        read = FLOAT * M * C + adds * HALF * M * C + FLOAT * (2 + adds) * N * C
        return self.kernel("modulate_rows", TRANSFORMER, read, HALF * M * C + adds * FLOAT * M * C)

    def _attention(self, new: int, tokens: int) -> Work:
        C, N, heads, gpu = self.model.width, self.sequences, self.model.heads, self.gpu
        read, written = HALF * N * C * (new + 2 * tokens), HALF * N * C * new
        flops = 4.0 * N * C * new * tokens
        if tokens <= FEW_TOKENS:  # every query reads all keys and values from the cache
            us = ATTENTION_US + 1e6 * HALF * N * C * new * 2 * tokens / (CACHED * gpu.bandwidth)
            return self.moved("attention_rows", TRANSFORMER, read, written, us, flops)
        tiles = -(-tokens // 64)
        all_tiles = -(-new // 64) * heads * N * tiles
        rate = GPUS["h200"].rate / GPUS["h200"].multiprocessors / (gpu.rate / gpu.multiprocessors)
        full = max(
            TILE_US * rate * all_tiles / gpu.multiprocessors, 1e6 * (read + written) / (STREAMED * gpu.bandwidth)
        )
        return self.moved(
            "attention", TRANSFORMER, read, written, ATTENTION_US + max(full, LONE_TILE_US * rate * tiles), flops
        )


class _Maps(_Maker):
    """The decoder of some images."""

    def __init__(self, gpu: Gpu, decoder: Decoder, model: ModelFacts, images: int) -> None:
        super().__init__(gpu)
        self.decoder, self.model, self.images = decoder, model, images

    def decode(self, size: tuple[int, int]) -> Iterator[Work]:
        (h, w), D, B, sizes = size, self.model.code_dim, self.images, self.decoder
        tokens, levels = 4 * B * h * w, [sizes.channels * m for m in reversed(sizes.multipliers)]
        yield self.moved("copy", DECODER, tokens, tokens, COPY_US)
        yield self.moved("zero", DECODER, 0, 4 * B, COPY_US)
        yield self.kernel("look_up", DECODER, tokens + HALF * B * h * w * D, HALF * B * h * w * D)
        yield self.convolution("post_quant_conv", (B, h, w, D), sizes.latent, 1)
        yield self.convolution("decoder.conv_in", (B, h, w, sizes.latent), levels[0], 3)
        yield from self._residual("decoder.mid.0", h, w, levels[0], levels[0])
        yield from self._attention("decoder.mid.1", h, w, levels[0])
        yield from self._residual("decoder.mid.2", h, w, levels[0], levels[0])
        inputs = levels[0]
        for i, channels in enumerate(levels):
            level = f"decoder.conv_blocks.{i}"
            for j in range(sizes.blocks):
                yield from self._residual(f"{level}.res.{j}", h, w, inputs, channels)
                inputs = channels
                if i == 0:
                    yield from self._attention(f"{level}.attn.{j}", h, w, channels)
            if i < len(levels) - 1:
                size_of_map = HALF * B * h * w * channels
                yield self.kernel("double_map", DECODER, size_of_map, 4 * size_of_map)
                h, w = 2 * h, 2 * w
                yield self.convolution(f"{level}.upsample", (B, h, w, channels), channels, 3)
        yield from self._norm(h, w, inputs)
        yield self.convolution("decoder.conv_out", (B, h, w, inputs), OUTPUT_CHANNELS, 3)
        yield self.kernel("to_planes", DECODER, HALF * B * h * w * OUTPUT_CHANNELS, FLOAT * 3 * B * h * w)
        yield self.kernel("to_uint8", DECODER, FLOAT * 3 * B * h * w, 3 * B * h * w)

    def _norm(self, h: int, w: int, channels: int) -> Iterator[Work]:
        size, parts = HALF * self.images * h * w * channels, chunks(h * w, channels)[0]
        yield self.kernel("group_statistics", DECODER, size, 0, ROW_US + CHUNK_US * parts)
        yield self.kernel("group_normalise", DECODER, size, size)

    def _residual(self, name: str, h: int, w: int, inputs: int, channels: int) -> Iterator[Work]:
        B = self.images
        yield from self._norm(h, w, inputs)
        yield self.convolution(f"{name}.conv1", (B, h, w, inputs), channels, 3)
        yield from self._norm(h, w, channels)
        if inputs != channels:
            yield self.convolution(f"{name}.nin_shortcut", (B, h, w, inputs), channels, 1)
        yield self.convolution(f"{name}.conv2", (B, h, w, channels), channels, 3, residual=True)

    def _attention(self, name: str, h: int, w: int, channels: int) -> Iterator[Work]:
        B, L, stride = self.images, h * w, -(-h * w // 8) * 8
        yield from self._norm(h, w, channels)
        yield self.convolution(f"{name}.qkv", (B, h, w, channels), 3 * channels, 1)
        yield self.product(f"{name}.scores", DECODER, (L, L, channels), batch=B, bias=False, wide=True)
        yield self.kernel("softmax_rows", DECODER, FLOAT * B * L * stride, HALF * B * L * stride)
        yield self.product(f"{name}.values", DECODER, (L, channels, L), batch=B, bias=False)
        yield self.convolution(f"{name}.proj_out", (B, h, w, channels), channels, 1, residual=True)


def _line(coefficients: tuple[float, float, float], summed: int, bound_us: float) -> float:
    once, each, stretch = coefficients
    return once + each * summed + stretch * bound_us


@cache
def measured_us() -> dict[str, dict[int, float]]:
    """Times in RESULTS in fp16, of the first algorithm: by shape, then by rows of a product or images of a convolution.

    A number of rows that was measured twice has the mean.
    """
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    shapes = {"qkv": "1024x3072", "proj": "1024x1024", "fc1": "1024x4096", "fc2": "4096x1024", "head": "1024x8912"}
    found: dict[str, dict[int, list[float]]] = {}
    for batch in (1, 8, 64):
        for case, times in results["products"]["us"][f"fp16 KN B{batch}"].items():
            name, rows = case.split()
            found.setdefault(f"product {shapes[name]}", {}).setdefault(int(rows), []).append(times["all"][0])
    for case, times in results["convolutions"]["us"].items():
        precision, batch, shape = case.split(" ", 2)
        if precision == "fp16":
            found.setdefault(shape, {})[int(batch[1:])] = [times["first"]]
    for case, outputs in results["convolutions"]["last"].items():
        images = int(case.rpartition("B")[2])
        found.setdefault(f"3x3 128>{OUTPUT_CHANNELS} @256", {})[images] = [outputs[str(OUTPUT_CHANNELS)]["us"]]
    return {shape: {size: float(np.mean(times[size])) for size in sorted(times)} for shape, times in found.items()}
