"""The device buffers of a generation, as data: what is allocated can be counted before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..conditions import RowGroup
from ..manifest import ModelFacts
from ..schedule import ScaleSchedule
from . import kernels
from .array import DeviceArray, aligned
from .device import Device

Fields: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]
"""Name to shape and dtype."""


@dataclass(frozen=True)
class Shape:
    """What decides the buffers of a generation."""

    schedule: ScaleSchedule
    images: int
    guided: bool

    @property
    def sequences(self) -> int:
        return self.images * (2 if self.guided else 1)


class Arena:
    """Arrays of named shapes in one allocation on the device, each aligned; with `pinned`, mirrored on the host."""

    def __init__(self, device: Device, fields: Fields, *, pinned: bool = False) -> None:
        arrays, end = {}, 0
        for name, (shape, dtype) in fields.items():
            arrays[name] = DeviceArray(end, shape, dtype, None)
            end += aligned(arrays[name].nbytes)
        memory = device.allocate(end)
        self.nbytes = end
        self.arrays = {
            name: DeviceArray(memory.address + array.address, array.shape, array.dtype, memory)
            for name, array in arrays.items()
        }
        self.whole = DeviceArray(memory.address, (end,), "uint8", memory)
        self.host_whole = device.pinned(end) if pinned else np.empty(0, np.uint8)
        self.host = {
            name: self.host_whole[array.address : array.address + array.nbytes].view(array.dtype).reshape(array.shape)
            for name, array in (arrays.items() if pinned else ())
        }

    def __getitem__(self, name: str) -> DeviceArray:
        return self.arrays[name]


def decode_parts(images: int, most: int) -> tuple[range, ...]:
    """Which images go through the decoder together: at most `most` at a time."""
    return tuple(range(start, min(start + most, images)) for start in range(0, images, most))


def request_fields(shape: Shape) -> Fields:
    """What changes from call to call, in pinned memory: slots of the conditions, guidance of every scale, streams."""
    return {
        "slots": ((shape.sequences,), "int32"),
        "streams": ((kernels.stream_words(shape.images),), "uint32"),
        **{f"t_{i}": ((shape.images,), "float32") for i in range(len(shape.schedule))},
    }


def result_fields(model: ModelFacts, shape: Shape) -> Fields:
    """What comes back, in pinned memory."""
    h, w = shape.schedule[-1]
    factor = model.downsampling
    return {
        "status": ((kernels.STATUS_WORDS,), "uint32"),
        **{f"tokens_{i}": ((shape.images, h, w), "int32") for i, (h, w) in enumerate(shape.schedule)},
        "pixels": ((shape.images, h * factor, w * factor, 3), "uint8"),
    }


def condition_name(group: int) -> str:
    """Name of the buffer that holds a group of what the condition graph computes."""
    return f"condition_{group}"


def work_fields(
    model: ModelFacts, shape: Shape, kv_dtype: str, groups: Sequence[RowGroup], parts: Sequence[range]
) -> Fields:
    """What stays on the device. groups: of the condition graph's outputs; parts: of the images, see `decode_parts`."""
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


def nbytes(fields: Fields) -> int:
    """Bytes of an arena of these fields."""
    return sum(aligned(DeviceArray(0, shape, dtype, None).nbytes) for shape, dtype in fields.values())
