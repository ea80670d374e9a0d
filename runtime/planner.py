"""How much memory a generation needs, known before a graph is opened: refused in time, with the batch that would fit.

Keys, values and everything else a graph is bound to are exact: they follow from the declared tensors. What a runtime
takes beside them is a model of ONNX Runtime on the CPU; an engine that says its own working memory overrides it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from .errors import OutOfMemory
from .graphs import CONDITION, DECODE, STEP, new_names, past_names
from .manifest import GraphSpec, Manifest, TensorSpec
from .schedule import ScaleSchedule

IMAGES_PER_RUN = 8  # images in one run of the decoder or encoder, at the most
MAX_BATCH = 2**20

_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that generating `images` at once takes, part by part; mappings are by graph.

    runtime: the process and its libraries. weights: as the runtime holds them. kv: keys and values of all scales.
    bindings: inputs and logits of the largest scale. tables: offsets of every scale, and the classes' conditions.
    pixels: decoded images. scratch: working memory inside a graph.
    """

    schedule: ScaleSchedule
    images: int
    guided: bool
    decoded_at_once: int
    runtime: int
    weights: Mapping[str, int]
    kv: int
    bindings: int
    tables: int
    pixels: int
    scratch: Mapping[str, int]

    @property
    def phases(self) -> dict[str, int]:
        """Bytes held at the height of each phase. The condition is gone before the loop, which stays for the decoder."""
        return self._phases(())

    @property
    def total(self) -> int:
        return max(self.phases.values())

    def needed(self, opened: Collection[str] = ()) -> int:
        """Bytes to be taken by a process that runs already and has some graphs open."""
        return max(self._phases(opened).values()) - self.runtime

    def _phases(self, opened: Collection[str]) -> dict[str, int]:
        weights = {graph: 0 if graph in opened else size for graph, size in self.weights.items()}
        condition = self.runtime + weights[CONDITION] + self.scratch[CONDITION]
        loop = self.runtime + self.tables + weights[STEP] + self.kv + self.bindings + self.scratch[STEP]
        return {
            CONDITION: condition,
            "loop": loop,
            DECODE: loop + weights[DECODE] + self.pixels + self.scratch[DECODE],
        }


def plan(
    manifest: Manifest,
    schedule: ScaleSchedule,
    images: int,
    guided: bool,
    *,
    decoded_at_once: int = IMAGES_PER_RUN,
    runtime: int | None = None,
    scratch: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """What a generation takes. `runtime` and `scratch` (by graph) replace the model of ort-cpu where they are known."""
    model, N, C = manifest.model, images * (2 if guided else 1), manifest.model.width
    decoded = min(images, decoded_at_once)
    h, w = schedule[-1]
    sizes = {"labels": 2, "sequences": N, "images": images, "new": schedule.largest, "past": 0}
    step = _tensor_bytes(manifest.graphs[STEP], sizes)
    cache = {*past_names(model.depth), *new_names(model.depth)}
    whole = _tensor_bytes(manifest.graphs[STEP], sizes | {"new": schedule.tokens})
    rows = sum(_tensor_bytes(manifest.graphs[CONDITION], {"labels": 1}).values())
    image = _tensor_bytes(manifest.graphs[DECODE], {"images": 1, "height": h, "width": w})
    return MemoryPlan(
        schedule=schedule,
        images=images,
        guided=guided,
        decoded_at_once=decoded,
        runtime=60 * 2**20 if runtime is None else runtime,
        weights={graph: _weight_bytes(manifest, graph) for graph in (CONDITION, STEP, DECODE)},
        kv=sum(whole[name] for name in cache),
        bindings=sum(size for name, size in step.items() if name not in cache),
        tables=sum(h * w for h, w in schedule.scales[1:]) * C * 4 + (images + 1) * rows,
        pixels=sum(image.values()) * (3 * decoded + images),
        scratch={
            CONDITION: 0,
            STEP: 24 * N * schedule.largest * C * 4 + N * model.heads * schedule.largest * schedule.tokens * 4,
            DECODE: decoded * image_scratch(manifest, DECODE, (h, w)),
        }
        | dict(scratch or {}),
    )


def image_scratch(manifest: Manifest, graph: str, size: tuple[int, int]) -> int:
    """Working memory of decoding or encoding one image of (h, w) tokens."""
    h, w = size
    return 6 * h * w * manifest.model.downsampling**2 * 128 * 4


def largest_batch(needed: Callable[[int], int], available: int) -> int:
    """The most images whose `needed` bytes (growing with their number) are available; 0 where not even one is."""
    fits, refused = 0, MAX_BATCH
    while refused - fits > 1:
        middle = min(2 * fits, (fits + refused) // 2) if fits else 1
        fits, refused = (middle, refused) if needed(middle) <= available else (fits, middle)
    return fits


def require_fits(
    plans: Callable[[int], MemoryPlan], images: int, available: int | None, opened: Collection[str] = ()
) -> None:
    """Raise OutOfMemory where `images` at once do not fit in what is left; it names the parts and the batch that does."""
    if available is None or plans(images).needed(opened) <= available:
        return
    wanted = plans(images)
    fits = largest_batch(lambda batch: plans(batch).needed(opened), available)
    weights = sum(size for graph, size in wanted.weights.items() if graph not in opened)
    parts = {
        "weights": weights,
        "keys and values": wanted.kv,
        "inputs and outputs": wanted.bindings + wanted.tables + wanted.pixels,
        "working memory": wanted.scratch[STEP] + wanted.scratch[DECODE],
    }
    raise OutOfMemory(
        f"a batch of {images} at schedule {wanted.schedule} that needs {_gib(wanted.needed(opened))} "
        f"({', '.join(f'{name} {_gib(size)}' for name, size in parts.items())})",
        expected=f"at most {_gib(available)}",
        fix=f"use a batch of at most {fits}" if fits else "use a smaller schedule, or a machine with more memory",
    )


def batch_that_fits(manifest: Manifest, graph: str, size: tuple[int, int], available: int | None) -> int:
    """Images to decode or encode in one run, in half of what is left. Raises OutOfMemory where one does not fit."""
    one = image_scratch(manifest, graph, size)
    if available is None:
        return IMAGES_PER_RUN
    if one > available:
        raise OutOfMemory(
            f"{graph.removesuffix('e')}ing an image of {size[0]}x{size[1]} tokens that needs {_gib(one)}",
            expected=f"at most {_gib(available)}",
            fix="use a smaller size",
        )
    return max(1, min(IMAGES_PER_RUN, available // (2 * one)))


def _weight_bytes(manifest: Manifest, graph: str) -> int:
    """Bytes of a graph's files: itself, and the weights beside it."""
    file = manifest.graphs[graph].file
    return sum(record.size for name, record in manifest.files.items() if name == file or name.startswith(f"{file}."))


def _tensor_bytes(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every input and output, given the sizes of the named axes."""

    def size(axis: str | int) -> int:
        if isinstance(axis, int):
            return axis
        base, _, factor = axis.partition("_x")
        return sizes[base] * int(factor or 1)

    def nbytes(tensor: TensorSpec) -> int:
        return math.prod(map(size, tensor.axes)) * _ITEMSIZE[tensor.dtype]

    return {tensor.name: nbytes(tensor) for tensor in (*spec.inputs, *spec.outputs)}


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
