"""The memory that a generation needs on a CPU, computed before any graph is opened.

The sizes of keys, values and all other inputs and outputs follow from the declared tensors. The memory that a library
takes besides them comes from `library.LibraryMemory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..bundle.manifest import Manifest
from ..errors import OutOfMemory
from ..model.schedule import ScaleSchedule
from ..model.signatures import CONDITION, DECODE, STEP, TABLES_FILE, graph_specs, new_names, past_names
from ..model.tensors import GraphSpec
from .library import LibraryMemory

IMAGES_PER_RUN = 8  # at most, in one run of decoder or encoder
PYTHON = 30 * 2**20  # the interpreter and NumPy
PUBLISHED_DECODER = (128, 128)  # channels at the size of the image, and one level below
MAX_BATCH = 2**20
CLASSES_KEPT = 32  # classes whose condition is kept on a CPU (0.4 MB each for d16)

_MIB = 2**20
_SIZES = ("runtime", "weights", "kv", "bindings", "tables", "pixels", "scratch", "again")
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The parts of the memory of generating `images` at once, in bytes. Mappings are by graph.

    runtime: the process with its libraries. weights: of each graph, in memory. kv: keys and values of all scales.
    bindings: inputs and logits of the largest scale. tables: offsets of every scale, and conditions of the classes.
    pixels: decoded images, as floats and as bytes. scratch: working memory of each graph. again: additional working
    memory of the decoder from its second run on. kept: graphs that stay open after their use.
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
    again: int = 0
    kept: frozenset[str] = frozenset()

    @property
    def phases(self) -> dict[str, int]:
        """Peak of each phase in bytes.

        The condition graph is closed before the loop, unless it is kept. The buffers of the loop stay while the decoder
        runs. "next" is the condition of a next request, with everything else still in memory.
        """
        return self._phases(())

    @property
    def total(self) -> int:
        """Peak in bytes of one generation in a fresh process."""
        return _peak(self.phases)

    def needed(self, opened: Collection[str] = ()) -> int:
        """Bytes that a running process with these open graphs must still take."""
        return _peak(self._phases(opened)) - self.runtime

    def parts(self, opened: Collection[str] = ()) -> dict[str, int]:
        """Bytes of the decoder's phase by part, without `runtime`, for messages. It is nearly always the peak."""
        held = {STEP, DECODE, *self.kept} - {*opened}
        weights = sum(size for graph, size in self.weights.items() if graph in held)
        return {
            "weights": weights,
            "keys and values": self.kv,
            "inputs and outputs": self.bindings + self.tables + self.pixels,
            "working memory": self.scratch[STEP] + self.scratch[DECODE] + self._rerun,
        }

    @property
    def _rerun(self) -> int:
        return self.again if self.images >= 2 * self.decoded_at_once else 0

    def _phases(self, opened: Collection[str]) -> dict[str, int]:
        weights = {graph: 0 if graph in opened else size for graph, size in self.weights.items()}
        kept = weights[CONDITION] if CONDITION in self.kept else 0
        loop = self.runtime + kept + self.tables + weights[STEP] + self.kv + self.bindings + self.scratch[STEP]
        decode = loop + weights[DECODE] + self.pixels + self.scratch[DECODE]
        condition = weights[CONDITION] - kept + self.scratch[CONDITION]
        return {
            CONDITION: self.runtime + kept + condition,
            "loop": loop,
            DECODE: decode + self._rerun,
            "next": decode + self.again + condition,
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, in bytes."""
        values = {**vars(self), "schedule": str(self.schedule)}
        request = {name: values[name] for name in ("schedule", "images", "guided", "decoded_at_once")}
        sizes = {name: values[name] for name in _SIZES}
        return {**request, "bytes": sizes, "phases": self.phases, "total": self.total}


def plan(
    manifest: Manifest,
    schedule: ScaleSchedule,
    images: int,
    guided: bool,
    libraries: Mapping[str, LibraryMemory],
    *,
    decoded_at_once: int = IMAGES_PER_RUN,
    decoder_channels: tuple[int, int] = PUBLISHED_DECODER,
) -> MemoryPlan:
    """The memory of generating `images` at once on a CPU. A guided image takes two sequences.

    libraries: the constants of the library that runs each graph, from `backends.libraries`. decoder_channels: at the
    size of the image, and one level below.
    """
    model = manifest.model
    graphs = graph_specs(model, manifest.precision, manifest.schema_version)
    transformer, tokenizer = libraries[STEP], libraries[DECODE]
    decoded = min(images, decoded_at_once)
    h, w = schedule[-1]
    N, L, T = images * (2 if guided else 1), schedule.largest, schedule.tokens
    sizes = {"sequences": N, "images": images, "new": L, "past": 0}
    cache = {*past_names(model.depth), *new_names(model.depth)}
    step = tensor_bytes(graphs[STEP], sizes)
    all_scales = tensor_bytes(graphs[STEP], sizes | {"new": T})
    condition = sum(tensor_bytes(graphs[CONDITION], {"labels": 1}).values())
    image = sum(tensor_bytes(graphs[DECODE], {"images": 1, "height": h, "width": w}).values())
    offsets = (T - 1) * model.width * 4
    decoding = tokenizer.image(manifest, (h, w), decoder_channels)
    if not tokenizer.decodes_one_by_one(manifest, (h, w)):
        decoding *= decoded
    return MemoryPlan(
        schedule=schedule,
        images=images,
        guided=guided,
        decoded_at_once=decoded,
        runtime=PYTHON + sum(library.runtime for library in {transformer, tokenizer}),
        weights={graph: libraries[graph].weights(manifest, graph) for graph in (CONDITION, STEP, DECODE)},
        kv=sum(all_scales[name] for name in cache),
        bindings=sum(size for name, size in step.items() if name not in cache),
        tables=manifest.file_bytes(TABLES_FILE) + offsets + (N + max(images + 1, CLASSES_KEPT)) * condition,
        pixels=(3 * decoded + images) * image,
        scratch={CONDITION: 2 * condition, STEP: transformer.step(manifest, N, L, T), DECODE: decoding},
        again=decoding,
        kept=frozenset({CONDITION} if transformer.keeps_condition else ()),
    )


def tensor_bytes(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every input and output of a graph for given sizes of its named axes."""
    tensors = (*spec.inputs, *spec.outputs)
    return {tensor.name: math.prod(tensor.shape(sizes)) * _ITEMSIZE[tensor.dtype] for tensor in tensors}


def largest_batch(needed: Callable[[int], int], available: int) -> int:
    """The largest number of images whose `needed` bytes are available, 0 if not even one fits.

    needed: bytes for a number of images, which grow with the number.
    """
    fits, refused = 0, MAX_BATCH
    while refused - fits > 1:
        middle = min(max(2 * fits, 1), (fits + refused) // 2)
        fits, refused = (middle, refused) if needed(middle) <= available else (fits, middle)
    return fits


def require_fits(
    plans: Callable[[int], MemoryPlan], images: int, available: int | None, opened: Collection[str] = ()
) -> None:
    """Raise OutOfMemory, with the parts and the largest batch that fits, if the plan of `images` needs too much.

    plans: returns the plan of a number of images. available: bytes, None if unknown. opened: graphs that are open.
    """
    wanted = plans(images)
    if available is None or wanted.needed(opened) <= available:
        return
    fits = largest_batch(lambda batch: plans(batch).needed(opened), available)
    parts = ", ".join(f"{part} {size_text(size)}" for part, size in wanted.parts(opened).items())
    needs = f"A batch of {images} at schedule {wanted.schedule} needs {size_text(wanted.needed(opened))} ({parts})"
    fix = f"Use a batch of at most {fits}." if fits else "Use a smaller schedule, or a machine with more memory."
    raise _out_of_memory(needs, available, fix)


def _out_of_memory(needs: str, available: int, fix: str) -> OutOfMemory:
    free = size_text(available)
    return OutOfMemory(f"{needs}, but only {free} is available.", expected=f"at most {free}", fix=fix)


def batch_that_fits(
    manifest: Manifest,
    graph: str,
    size: tuple[int, int],
    available: int | None,
    opened: Collection[str],
    library: LibraryMemory,
) -> int:
    """Number of images to decode or encode in one run. Raises OutOfMemory if not even one fits.

    They take at most half of the memory that the weights leave, because a second run takes as much again.
    """
    if available is None:
        return IMAGES_PER_RUN
    one = library.image(manifest, size, PUBLISHED_DECODER)
    weights = 0 if graph in opened else library.weights(manifest, graph)
    if weights + one > available:
        verb = "Decoding" if graph == DECODE else "Encoding"
        needs = f"{verb} an image of {size[0]}x{size[1]} tokens needs {size_text(weights + one)}"
        raise _out_of_memory(needs, available, "Use a smaller size.")
    return max(1, min(IMAGES_PER_RUN, (available - weights) // (2 * one)))


def _peak(phases: Mapping[str, int]) -> int:
    """The peak of one generation."""
    return max(phases[phase] for phase in (CONDITION, "loop", DECODE))


def size_text(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / _MIB:.1f} MiB"
