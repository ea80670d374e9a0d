"""The device buffers of a generation as data, so that they can be counted before they are allocated."""

from __future__ import annotations

from collections.abc import Sequence

from ..cuda import kernels
from ..cuda.arena import Fields
from ..model.facts import ModelFacts
from ..request import Shape
from .conditions import RowGroup


def decode_parts(images: int, most: int) -> tuple[range, ...]:
    """The images that go through the decoder together, at most `most` at a time."""
    return tuple(range(start, min(start + most, images)) for start in range(0, images, most))


def request_fields(shape: Shape) -> Fields:
    """Values that change from call to call, in pinned memory.

    slots of the conditions, random streams, top_k of every scale, dropped mass of top_p, guidance weights of every
    scale."""
    return {
        "slots": ((shape.sequences,), "int32"),
        "streams": ((kernels.stream_words(shape.images),), "uint32"),
        "top_k": ((len(shape.schedule),), "int32"),
        "drop": ((1,), "float64"),
        **{f"t_{i}": ((shape.images,), "float32") for i in range(len(shape.schedule))},
    }


def result_fields(model: ModelFacts, shape: Shape) -> Fields:
    """Results, in pinned memory."""
    h, w = shape.schedule[-1]
    factor = model.downsampling
    return {
        "status": ((kernels.STATUS_WORDS,), "uint32"),
        **{f"tokens_{i}": ((shape.images, h, w), "int32") for i, (h, w) in enumerate(shape.schedule)},
        "pixels": ((shape.images, h * factor, w * factor, 3), "uint8"),
    }


def condition_name(group: int) -> str:
    """Name of the buffer for a group of outputs of the condition graph."""
    return f"condition_{group}"


def work_fields(
    model: ModelFacts, shape: Shape, kv_dtype: str, groups: Sequence[RowGroup], parts: Sequence[range]
) -> Fields:
    """Buffers that stay on the device. groups: of the outputs of the condition graph. parts: see `decode_parts`."""
    N, B, C, D = shape.sequences, shape.images, model.width, model.code_dim
    schedule, factor = shape.schedule, model.downsampling
    later = max((h * w for h, w in schedule.scales[1:]), default=1)
    h, w = schedule[-1]
    return {
        "cond_rows": ((B,), "int32"),
        "uncond_rows": ((B,), "int32"),
        **{condition_name(g): ((len(group.names), N, *group.row), "float32") for g, group in enumerate(groups)},
        "no_codes": ((N, 1, D), "float32"),
        "codes": ((N * later * D,), "float32"),
        "offset": ((N * later * C,), "float32"),
        **{f"positions_{i}": ((a * b, C), "float32") for i, (a, b) in enumerate(schedule) if i},
        **{
            f"{axis}_{part}_{i}": ((schedule[i][k], kernels.TAPS), kind)
            for i in range(1, len(schedule))
            for k, axis in enumerate("yx")
            for part, kind in (("index", "int32"), ("weight", "float32"))
        },
        "cache": ((2 * model.depth, schedule.tokens, N, model.heads, model.head_size), kv_dtype),
        "logits": ((B * schedule.largest * model.vocabulary,), "float32"),
        **{f"last_{k}": ((len(part), h, w), "int32") for k, part in enumerate(parts)},
        **{f"image_{k}": ((len(part), 3, h * factor, w * factor), "float32") for k, part in enumerate(parts)},
    }
