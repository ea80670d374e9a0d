"""How much of a GPU a generation takes, known before an engine is built or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle import Bundle
from ..conditions import RowGroup, row_groups
from ..engines import graph_files
from ..errors import OutOfMemory
from ..graphs import CONDITION, DTYPE_OF_PRECISION, PREFILL, REQUIRED
from ..manifest import ModelFacts
from ..planner import IMAGES_PER_RUN, largest_batch
from .array import DeviceArray
from .buffers import Shape, decode_parts, nbytes, request_fields, result_fields, work_fields


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Bytes on the device: weights of every graph, keys and values of all scales, every other buffer.

    Working memory inside the graphs comes on top: an engine says how much when it is loaded.
    """

    weights: int
    kv: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.buffers


def generation_bytes(model: ModelFacts, shape: Shape, kv_dtype: str, groups: Sequence[RowGroup]) -> int:
    """Buffers of a generation, exactly as they are allocated. groups: of the condition graph's outputs."""
    parts = decode_parts(shape.images, IMAGES_PER_RUN)
    fields = request_fields(shape), result_fields(model, shape), work_fields(model, shape, kv_dtype, groups, parts)
    return sum(map(nbytes, fields))


def device_plan(bundle: Bundle, shape: Shape, prefill: bool = False) -> DevicePlan:
    """What a generation of a bundle takes on a device. prefill: with an engine of its own for given scales, which
    holds the weights of the step once more."""
    manifest = bundle.manifest
    kv_dtype = DTYPE_OF_PRECISION[manifest.precision]
    cache_shape, cache_dtype = work_fields(manifest.model, shape, kv_dtype, (), ())["cache"]
    kv = DeviceArray(0, cache_shape, cache_dtype, None).nbytes
    graphs = [*REQUIRED, *([PREFILL] if prefill else [])]
    files = [name for graph in graphs for name in graph_files(bundle, graph)]
    return DevicePlan(
        weights=sum(manifest.files[name].size for name in files),
        kv=kv,
        buffers=generation_bytes(manifest.model, shape, kv_dtype, row_groups(bundle.graph(CONDITION))) - kv,
    )


def require_on_device(bundle: Bundle, shape: Shape, available: int, device: str, prefill: bool = False) -> None:
    """Raise OutOfMemory where a generation does not fit on a device; it names the parts and the batch that does."""
    wanted = device_plan(bundle, shape, prefill)
    if wanted.total <= available:
        return
    fits = largest_batch(
        lambda images: device_plan(bundle, Shape(shape.schedule, images, shape.guided), prefill).total, available
    )
    raise OutOfMemory(
        f"a batch of {shape.images} at schedule {shape.schedule} that needs {_gib(wanted.total)} on {device} "
        f"(weights {_gib(wanted.weights)}, keys and values {_gib(wanted.kv)}, buffers {_gib(wanted.buffers)})",
        expected=f"at most {_gib(available)}",
        fix=f"use a batch of at most {fits}" if fits else "use a smaller schedule, or a GPU with more memory",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
