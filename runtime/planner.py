"""How much memory a generation needs, known before a graph is opened: refused in time, with the batch that would fit.

Keys, values and everything else that is bound to a graph are exact: they follow from the declared tensors. What ONNX
Runtime or OpenVINO takes beside them on the CPU is a model with few constants, each of them measured
(`benchmarks/LOG.md`) and with a margin: a plan is never below the peak (not measured: OpenVINO's decoder in bfloat16
on processors that do not compute in it). A backend that knows its own working memory
says so (`scratch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import OutOfMemory
from .graphs import (
    CONDITION,
    DECODE,
    ENCODE,
    STEP,
    TABLES_FILE,
    graph_precision,
    graph_specs,
    is_half,
    new_names,
    past_names,
)
from .manifest import PHASES, PLAIN, TRANSPOSED, GraphSpec, Manifest
from .schedule import ScaleSchedule

IMAGES_PER_RUN = 8  # of decoder and encoder, at the most
PYTHON = 30 * 2**20  # the interpreter and NumPy
PUBLISHED_DECODER = (128, 128)  # channels at the image's size, and of the level below
MAX_BATCH = 2**20

_MIB = 2**20
_ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that generating `images` at once takes, part by part; mappings are by graph.

    runtime: the process with its libraries. weights: as the runtime holds them. kv: keys and values of all scales.
    bindings: inputs and logits of the largest scale. tables: offsets of every scale, and the classes' conditions.
    pixels: decoded images, as floats and as bytes. scratch: working memory inside a graph. again: what a second run
    of the decoder takes more. kept: graphs that stay open although they have done their part.
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
        """Bytes held at the height of each phase. The condition is gone before the loop if it is not kept; the loop
        stays for the decoder.

        "next": of a pipeline that goes on to other classes, with everything else still there.
        """
        return self._phases(())

    @property
    def total(self) -> int:
        """Peak of one generation in a fresh process."""
        return _peak(self.phases)

    def needed(self, opened: Collection[str] = ()) -> int:
        """Bytes that a process which runs already, with these graphs open, has still to take."""
        return _peak(self._phases(opened)) - self.runtime

    def parts(self, opened: Collection[str] = ()) -> dict[str, int]:
        """What the decoder's phase takes in few words, `runtime` left out: the highest of nearly every generation."""
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
        """Sizes in bytes."""
        return {
            "schedule": str(self.schedule),
            "images": self.images,
            "guided": self.guided,
            "decoded_at_once": self.decoded_at_once,
            "bytes": {
                "runtime": self.runtime,
                "weights": dict(self.weights),
                "kv": self.kv,
                "bindings": self.bindings,
                "tables": self.tables,
                "pixels": self.pixels,
                "scratch": dict(self.scratch),
                "again": self.again,
            },
            "phases": self.phases,
            "total": self.total,
        }


def plan(
    manifest: Manifest,
    schedule: ScaleSchedule,
    images: int,
    guided: bool,
    *,
    decoded_at_once: int = IMAGES_PER_RUN,
    decoder_channels: tuple[int, int] = PUBLISHED_DECODER,
    backend: str = "ort-cpu",
    bf16_arithmetic: bool = False,
) -> MemoryPlan:
    """What generating `images` at once takes on ort-cpu, openvino or both; `guided` runs two sequences an image.

    bf16_arithmetic: whether the backend computes bfloat16 as such on this processor; elsewhere it is widened.
    A backend that knows its own weights, working memory or libraries replaces them: `replace(plan(…), scratch=…)`.
    """
    model = manifest.model
    graphs = graph_specs(model, manifest.precision, manifest.schema_version)
    libraries = {graph: _library(manifest, backend, graph, bf16_arithmetic) for graph in (CONDITION, STEP, DECODE)}
    library, tokenizer = libraries[STEP], libraries[DECODE]
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
    decoding = image_bytes(manifest, (h, w), decoder_channels, backend, bf16_arithmetic)
    if not tokenizer.one_by_one(manifest, (h, w)):
        decoding *= decoded
    return MemoryPlan(
        schedule=schedule,
        images=images,
        guided=guided,
        decoded_at_once=decoded,
        runtime=PYTHON + sum(part.RUNTIME for part in {library, tokenizer}),
        weights={graph: part.weights(manifest, graph) for graph, part in libraries.items()},
        kv=sum(all_scales[name] for name in cache),
        bindings=sum(size for name, size in step.items() if name not in cache),
        tables=_file_bytes(manifest, TABLES_FILE) + offsets + (N + images + 1) * condition,
        pixels=(3 * decoded + images) * image,
        scratch={
            CONDITION: 2 * condition,
            STEP: library.step(manifest, N, L, T),
            DECODE: decoding,
        },
        again=decoding,
        kept=library.KEPT,
    )


class _Ort:
    """What ONNX Runtime takes on the CPU, measured with 1.31. A map is (sequences, new tokens, width) of float32.

    Working memory comes from an arena that grows by doubling and gives nothing back: ARENA is what it holds over what
    is alive in it. A second run of a shape takes what is alive once more, in one piece.
    """

    KEPT: frozenset[str] = frozenset()
    RUNTIME = 50 * _MIB  # the library and its first session: 40 here, versions differ
    ARENA = 1.45
    MLP_MAPS = 23  # alive in the feed-forward part of a block
    ATTENTION_MAPS = 14  # alive in its attention, beside scores, keys and values
    SAMPLING = 16 * 64  # rows of logits sampled at once, bytes per code of the vocabulary
    DECODER_MAPS = (6.4, 4.3)  # maps of pixels alive per channel: in a block, in the upsampling before it
    PHASE_MAPS = (6.4, 5.3)  # of a decoder in phases, whose results are joined
    TRANSPOSED_MAPS = (7.5, 6.5)  # of one with transposed convolutions
    HALF_DECODER = 1.25  # casts to float32 around every normalisation
    CONVOLUTIONS = 1.4  # weights reordered into blocks, and the copies that stay in the heap
    HALF_CONVOLUTIONS = 4.5  # read as float16, widened to float32, reordered

    @classmethod
    def weights(cls, manifest: Manifest, graph: str) -> int:
        """There are no kernels for half precision: its weights are widened to float32 when they are loaded."""
        size, half = _file_bytes(manifest, f"{graph}.onnx"), is_half(manifest.precision, graph)
        if graph in (DECODE, ENCODE):
            return int(size * (cls.HALF_CONVOLUTIONS if half else cls.CONVOLUTIONS))
        return 2 * size if half else size

    @classmethod
    def one_by_one(cls, manifest: Manifest, size: tuple[int, int]) -> bool:
        """Whether a batch of images of (h, w) tokens is decoded an image at a time."""
        return False

    @classmethod
    def step(cls, manifest: Manifest, sequences: int, new: int, tokens: int) -> int:
        """Working memory of the largest scale, and of sampling its tokens."""
        model = manifest.model
        one = sequences * new * model.width * 4
        joined = 2 * sequences * tokens * model.width * 4  # keys and values of a block: past and new in one
        scores = sequences * model.heads * new * tokens * 4
        alive = max(cls.MLP_MAPS * one, cls.ATTENTION_MAPS * one + joined + scores)
        return int(cls.ARENA * alive) + cls.SAMPLING * model.vocabulary

    @classmethod
    def image(cls, manifest: Manifest, pixels: int, channels: tuple[int, int]) -> int:
        """Working memory of decoding an image of so many pixels."""
        alive = {PLAIN: cls.DECODER_MAPS, PHASES: cls.PHASE_MAPS, TRANSPOSED: cls.TRANSPOSED_MAPS}[manifest.decoder]
        maps = max(maps * channel for maps, channel in zip(alive, channels, strict=True))
        return int(pixels * 4 * maps * (cls.HALF_DECODER if is_half(manifest.precision, DECODE) else 1))


class _OpenVino(_Ort):
    """What OpenVINO takes, measured with 2026.4: files stay mapped beside the weights that were repacked."""

    KEPT = frozenset({CONDITION})  # opening it is repacking it: that would cost every new class a tenth of a second
    RUNTIME = 102 * _MIB
    ARENA = 1.15
    PRODUCTS = 2.1
    HALF_PRODUCTS = 3.1  # the file, and float32 of twice its size; so widened it was measured at the tiny size only
    CONVOLUTIONS = 5.5  # in several layouts at once when they are first run
    HALF_CONVOLUTIONS = 11.0
    HALF = 1.35  # working memory, with keys and values widened

    @classmethod
    def weights(cls, manifest: Manifest, graph: str) -> int:
        size, half = _file_bytes(manifest, f"{graph}.onnx"), is_half(manifest.precision, graph)
        if graph in (DECODE, ENCODE):
            return int(size * (cls.HALF_CONVOLUTIONS if half else cls.CONVOLUTIONS))
        return int(size * (cls.HALF_PRODUCTS if half else cls.PRODUCTS))

    @classmethod
    def step(cls, manifest: Manifest, sequences: int, new: int, tokens: int) -> int:
        once = super().step(manifest, sequences, new, tokens)
        return int(cls.HALF * once) if is_half(manifest.precision, STEP) else once

    @classmethod
    def one_by_one(cls, manifest: Manifest, size: tuple[int, int]) -> bool:
        return graph_precision(manifest.precision, DECODE) == "bf16" and size == manifest.defaults.size


class _OpenVinoBf16(_OpenVino):
    """The same of bfloat16 where the processor computes in it: nothing is widened."""

    RUNTIME = 112 * _MIB
    ARENA = 1.2
    TRANSPOSED_MAPS = (9.0, 3.0)  # for any size; less for the usual one, compiled for its shape
    HALF = 1.0
    HALF_PRODUCTS = 2.4
    HALF_CONVOLUTIONS = 2.5
    HALF_DECODER = 0.5  # maps of two bytes


def _library(manifest: Manifest, backend: str, graph: str, bf16_arithmetic: bool) -> type[_Ort]:
    """What runs a graph: ort-openvino is two in one."""
    bf16_arithmetic &= graph_precision(manifest.precision, graph) == "bf16"
    if backend == "openvino" or (backend == "ort-openvino" and graph in (DECODE, ENCODE)):
        return _OpenVinoBf16 if bf16_arithmetic else _OpenVino
    return _Ort


def image_bytes(
    manifest: Manifest,
    size: tuple[int, int],
    channels: tuple[int, int] = PUBLISHED_DECODER,
    backend: str = "ort-cpu",
    bf16_arithmetic: bool = False,
) -> int:
    """Working memory of decoding one image of (h, w) tokens on the CPU; encoding takes less.

    channels: of the decoder, at the image's size and of the level below.
    """
    library = _library(manifest, backend, DECODE, bf16_arithmetic)
    return library.image(manifest, size[0] * size[1] * manifest.model.downsampling**2, channels)


def tensor_bytes(spec: GraphSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every input and output of a graph, given the sizes of its named axes."""
    tensors = (*spec.inputs, *spec.outputs)
    return {tensor.name: math.prod(tensor.shape(sizes)) * _ITEMSIZE[tensor.dtype] for tensor in tensors}


def largest_batch(needed: Callable[[int], int], available: int) -> int:
    """The most images whose `needed` bytes, which grow with their number, are available; 0 where one does not fit."""
    fits, refused = 0, MAX_BATCH
    while refused - fits > 1:
        middle = min(max(2 * fits, 1), (fits + refused) // 2)
        fits, refused = (middle, refused) if needed(middle) <= available else (fits, middle)
    return fits


def require_fits(
    plans: Callable[[int], MemoryPlan], images: int, available: int | None, opened: Collection[str] = ()
) -> None:
    """Raise OutOfMemory where the plan of `images` does not fit in what is left: its parts, and the batch that fits.

    plans: images to plan; opened: graphs whose weights are held already.
    """
    wanted = plans(images)
    if available is None or wanted.needed(opened) <= available:
        return
    fits = largest_batch(lambda batch: plans(batch).needed(opened), available)
    parts = ", ".join(f"{part} {size_text(size)}" for part, size in wanted.parts(opened).items())
    raise OutOfMemory(
        f"a batch of {images} at schedule {wanted.schedule} that needs {size_text(wanted.needed(opened))} ({parts})",
        expected=f"at most {size_text(available)}",
        fix=f"use a batch of at most {fits}" if fits else "use a smaller schedule, or a machine with more memory",
    )


def batch_that_fits(
    manifest: Manifest,
    graph: str,
    size: tuple[int, int],
    available: int | None,
    opened: Collection[str] = (),
    backend: str = "ort-cpu",
    bf16_arithmetic: bool = False,
) -> int:
    """Images to decode or encode in one run, in half of what is left beside the weights: a second run takes as much.

    Raises OutOfMemory where one does not fit.
    """
    if available is None:
        return IMAGES_PER_RUN
    one = image_bytes(manifest, size, backend=backend, bf16_arithmetic=bf16_arithmetic)
    weights = 0 if graph in opened else _library(manifest, backend, graph, bf16_arithmetic).weights(manifest, graph)
    if weights + one > available:
        raise OutOfMemory(
            f"{'decoding' if graph == DECODE else 'encoding'} an image of {size[0]}x{size[1]} tokens "
            f"that needs {size_text(weights + one)}",
            expected=f"at most {size_text(available)}",
            fix="use a smaller size",
        )
    return max(1, min(IMAGES_PER_RUN, (available - weights) // (2 * one)))


def _peak(phases: Mapping[str, int]) -> int:
    """Of one generation."""
    return max(phases[phase] for phase in (CONDITION, "loop", DECODE))


def size_text(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / _MIB:.1f} MiB"


def _file_bytes(manifest: Manifest, file: str) -> int:
    """Bytes of a file of the bundle, and of the weights beside it."""
    return sum(record.size for path, record in manifest.files.items() if path == file or path.startswith(f"{file}."))
