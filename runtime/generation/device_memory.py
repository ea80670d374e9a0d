"""How much memory of a GPU a generation takes, known before an engine is built or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..bundle.opening import Bundle
from ..cuda.arena import nbytes
from ..cuda.array import DeviceArray
from ..errors import OutOfMemory
from ..memory.plan import IMAGES_PER_RUN, largest_batch
from ..model.facts import ModelFacts
from ..model.signatures import CONDITION, PREFILL, REQUIRED
from ..request import Shape
from .conditions import RowGroup, row_groups
from .device_buffers import decode_parts, request_fields, result_fields, work_fields


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Bytes on the device: weights of every graph, keys and values of all scales, and every other buffer.

    The working memory inside the graphs is not in it. An engine says how much it takes when it is loaded.
    """

    weights: int
    kv: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.buffers


def generation_bytes(model: ModelFacts, shape: Shape, kv_dtype: str, groups: Sequence[RowGroup]) -> int:
    """Exact bytes of the buffers of a generation. groups: of the outputs of the condition graph."""
    parts = decode_parts(shape.images, IMAGES_PER_RUN)
    fields = request_fields(shape), result_fields(model, shape), work_fields(model, shape, kv_dtype, groups, parts)
    return sum(map(nbytes, fields))


def device_plan(bundle: Bundle, shape: Shape, prefill: bool = False) -> DevicePlan:
    """The memory of a generation on a device. prefill: with an engine of its own for given scales, which holds the
    weights of the step a second time."""
    manifest = bundle.manifest
    kv_dtype = manifest.precision.dtype
    cache_shape, cache_dtype = work_fields(manifest.model, shape, kv_dtype, (), ())["cache"]
    kv = DeviceArray(0, cache_shape, cache_dtype, None).nbytes
    graphs = [*REQUIRED, *([PREFILL] if prefill else [])]
    files = [name for graph in graphs for name in bundle.graph_files(graph)]
    return DevicePlan(
        weights=sum(manifest.files[name].size for name in files),
        kv=kv,
        buffers=generation_bytes(manifest.model, shape, kv_dtype, row_groups(bundle.graph(CONDITION))) - kv,
    )


def require_on_device(bundle: Bundle, shape: Shape, available: int, device: str, prefill: bool = False) -> None:
    """Raise OutOfMemory if a generation does not fit on a device. The message has the parts and the batch that fits."""

    def planned(images: int) -> DevicePlan:
        return device_plan(bundle, replace(shape, images=images), prefill)

    wanted = planned(shape.images)
    if wanted.total > available:
        fits = largest_batch(lambda images: planned(images).total, available)
        parts = f"weights {_gib(wanted.weights)}, keys and values {_gib(wanted.kv)}, buffers {_gib(wanted.buffers)}"
        raise refuse_shape(shape, wanted.total, available, device, fits, f" ({parts})")


def refuse_shape(shape: Shape, needed: int, available: int, device: str, fits: int, parts: str = "") -> OutOfMemory:
    """The error for a batch that does not fit on a device. fits: the largest batch that does."""
    return OutOfMemory(
        f"A batch of {shape.images} at schedule {shape.schedule} needs {_gib(needed)} on {device}{parts}, but "
        f"{_gib(available)} are available.",
        expected=f"at most {_gib(available)}",
        fix=f"Use a batch of at most {fits}." if fits else "Use a smaller schedule, or free memory of the GPU.",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
