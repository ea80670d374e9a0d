"""The least operations and bytes of a generation, and measured rates of this machine's processor."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.model.facts import ModelFacts

PUBLISHED_DECODER_FLOPS = 252.7e9  # the published tokenizer's decoder at 16 x 16 tokens
PUBLISHED_DECODER_TOKENS = 256
PUBLISHED_DECODER_BYTES = 0.9e9  # its feature maps in half precision at 16 x 16 tokens, read and written layer by layer
PHASE_SAVING = 0.106  # of the decoder's flops, if upsampling and 3 x 3 convolution become four 2 x 2 convolutions

# Half-precision maps of (tokens, width) that a block reads and writes, without weights and past keys and values.
# Activations and residual sums are fused into the products: two normalisations 4, q/k/v 4, their norms 4, attention 2,
# its projection 3, the MLP 5 + 6.
BLOCK_MAPS = 28
HALF = 2  # bytes


def transformer_flops(model: ModelFacts, schedule: ScaleSchedule, *, guided: bool) -> float:
    """Operations of one image (a multiply-add is two): blocks on every branch, the head once, without the condition."""
    branches, flops, past = (2 if guided else 1), 0.0, 0
    for h, w in schedule:
        new = h * w
        past += new
        products = 2 * 12 * model.width**2 * new  # q, k, v, projection and the MLP of width 4C
        attention = 4 * model.width * new * past
        flops += branches * model.depth * (products + attention) + 2 * model.width * model.vocabulary * new
    return flops


def decoder_flops(schedule: ScaleSchedule) -> float:
    """Operations of the published decoder for one image. They are proportional to the number of tokens."""
    return PUBLISHED_DECODER_FLOPS * schedule[-1][0] * schedule[-1][1] / PUBLISHED_DECODER_TOKENS


def step_weight_bytes(model: ModelFacts) -> float:
    """Bytes of the step graph's weights in half precision: blocks without their condition, and the head."""
    return HALF * (12 * model.width**2 * model.depth + model.width * model.vocabulary)


def kv_read_bytes(model: ModelFacts, schedule: ScaleSchedule, *, guided: bool) -> float:
    """Bytes of keys and values that attention reads for one image: at each scale those of all scales so far."""
    read = past = 0
    for h, w in schedule:
        past += h * w
        read += past
    return HALF * (2 if guided else 1) * 2 * model.depth * model.width * read


def activation_bytes(model: ModelFacts, schedule: ScaleSchedule, *, guided: bool) -> float:
    """Bytes that kernels pass to each other for one image: maps of every block and float32 logits, written and read."""
    maps = HALF * (2 if guided else 1) * BLOCK_MAPS * model.depth * model.width * schedule.tokens
    return maps + 2 * 4 * model.vocabulary * schedule.tokens


@dataclass(frozen=True)
class Limit:
    """The least time of `images` images, decoder included, on a GPU of a measured bandwidth and rate.

    strict_s: each scale takes the longer of reading its weights and its arithmetic, and the decoder its arithmetic. The
    first scale is not counted, because it depends on the class only. serial_s: the time of all bytes, with activations,
    plus the time of all arithmetic.
    """

    images: int
    flops: float
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    strict_s: float
    serial_s: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def generation_limit(
    model: ModelFacts,
    schedule: ScaleSchedule,
    images: int,
    *,
    guided: bool,
    bytes_per_second: float,
    flops_per_second: float,
) -> Limit:
    """The limit of a half-precision transformer with the published decoder.

    All exact savings are counted: the condition outside the loop, a cached first scale, the head after guidance, and
    upsampling as phase convolutions.
    """
    branches, weights = (2 if guided else 1), step_weight_bytes(model)
    decoder = images * decoder_flops(schedule) * (1 - PHASE_SAVING)
    flops, strict, past = decoder, decoder / flops_per_second, schedule[0][0] * schedule[0][1]
    for h, w in schedule.scales[1:]:
        new = h * w
        past += new
        block = 24 * model.width**2 * new + 4 * model.width * new * past
        scale = images * (branches * model.depth * block + 2 * model.width * model.vocabulary * new)
        flops += scale
        strict += max(weights / bytes_per_second, scale / flops_per_second)
    tokens = schedule[-1][0] * schedule[-1][1]
    kv = images * kv_read_bytes(model, schedule, guided=guided)
    maps = images * activation_bytes(model, schedule, guided=guided)
    maps += images * PUBLISHED_DECODER_BYTES * tokens / PUBLISHED_DECODER_TOKENS
    weights *= len(schedule) - 1
    serial = (weights + kv + maps) / bytes_per_second + flops / flops_per_second
    return Limit(images, flops, weights, kv, maps, strict, serial)


def measured_copy_bytes_per_second(seconds: float = 1.0, size: int = 2**28) -> float:
    """Best rate of a copy of `size` bytes over `seconds`, one thread: bytes read and written."""
    source = np.ones(size, np.uint8)
    target, best, end = np.empty_like(source), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def measured_flops_per_second(seconds: float = 1.0, side: int = 2048) -> float:
    """Best rate of a float32 matrix product over `seconds`: NumPy's BLAS, all of its threads."""
    a = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    b, best, end = a.copy(), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
