"""A whole generation on a device: captured as one CUDA graph where the backend can be captured, else enqueued again.

    request (slots, streams, options, guidance) ──> [ next_inputs ─> step ─> sample_rows ] per scale ─> decode ─>
    to_uint8

`CapturedGeneration` owns the buffers of one shape and enqueues the work. Nothing in it waits between scales.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Bound, Graph
from ..backends.device_arrays import DeviceBackend
from ..cuda import kernels
from ..cuda.arena import Arena
from ..cuda.array import DeviceArray
from ..cuda.device import Replay
from ..cuda.launches import Launch
from ..errors import FlexVARError, OutOfMemory
from ..memory.plan import IMAGES_PER_RUN
from ..model.facts import ModelFacts
from ..model.resize import bicubic_matrix
from ..model.signatures import DECODE, STEP
from ..model.tables import Tables
from ..pictures.pixels import refuse_pixels
from ..request import Request, Shape
from .conditions import ConditionCache, tensors
from .device_buffers import condition_name, decode_parts, request_fields, result_fields, work_fields
from .scale_loop import StepTensors, prefill_inputs, refuse_logits

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]
WARM_UPS = 2  # before a capture: engines settle on their shapes in the first, the second runs like the captured one


@dataclass(frozen=True)
class DeviceModel:
    """The parts of a model that all shapes on a device share."""

    backend: DeviceBackend
    facts: ModelFacts
    tables: Tables
    codebook: DeviceArray
    conditions: ConditionCache
    kv_dtype: str
    open_graph: Callable[[str], Graph]


class CapturedGeneration:
    """The buffers of one shape on the device, every graph bound to them, and the CUDA graph captured from them, if any.

    They serve every request of the shape. Seeds, guidance weights, top_k and top_p are read from
    buffers."""

    def __init__(self, model: DeviceModel, shape: Shape) -> None:
        self.shape = shape
        self._shared, self._facts = model, model.facts
        self._backend, self._device = model.backend, model.backend.device
        groups = model.conditions.groups
        self._parts = decode_parts(shape.images, IMAGES_PER_RUN)
        self._request = Arena(self._device, request_fields(shape), pinned=True)
        self._result = Arena(self._device, result_fields(self._facts, shape), pinned=True)
        self._work = Arena(self._device, work_fields(self._facts, shape, model.kv_dtype, groups, self._parts))
        self._condition_buffers = [self._work[condition_name(g)] for g in range(len(groups))]
        modulation: dict[str, DeviceArray] = tensors(groups, self._condition_buffers)
        self._first_input = modulation.pop("first_input")
        work, rows = self._work, (self._work["cond_rows"], self._work["uncond_rows"])
        self.tensors = StepTensors(modulation, *rows, work["cache"], work["logits"], self._facts.vocabulary)
        self._write_constants()
        self._steps = [self._bind_step(i) for i in range(len(shape.schedule))]
        self._decodes: list[Bound] = []
        self._replay: Replay | _Enqueue | None = None

    @property
    def warm(self) -> bool:
        """Whether it has run as a whole."""
        return self._replay is not None

    @property
    def nbytes(self) -> int:
        return self._request.nbytes + self._result.nbytes + self._work.nbytes

    def close(self) -> None:
        """Free the captured graph and the bindings. The device must be idle."""
        if self._replay is not None:
            self._replay.close()
        for bound in (*self._steps, *self._decodes):
            bound.close()
        self._replay = None  # what is enqueued refers back to this object
        self._steps, self._decodes = [], []

    def begin(self, request: Request) -> None:
        """Enqueue the values of a request: conditions, random streams, sampling options and guidance weights.

        The device must be idle, because the pinned block is written here.
        """
        null, host = [self._facts.null_class] * (request.images if self.shape.guided else 0), self._request.host
        host["slots"][:] = self._shared.conditions.slots([*request.labels, *null])
        host["streams"][:] = kernels.stream_block(request.seeds, request.indices)
        host["drop"][:] = kernels.drop_option(request.sampling.top_p)
        for i, weights in enumerate(request.weights()):
            host["top_k"][i] = kernels.top_k_option(request.top_k(i), self._facts.vocabulary)
            host[f"t_{i}"][:] = weights
        self._device.write(self._request.whole, self._request.host_whole)
        self._shared.conditions.gather(self._request["slots"], self._condition_buffers)
        self._device.zero(self._result["status"])

    def replay(self) -> tuple[str, float]:
        """Run the whole generation and wait. The first call captures it. Returns how it ran and its seconds on the
        device.

        `tokens` and `pixels` then have the results. Raises ArtifactRefused for logits or pixels that are not finite.
        """
        self._replay = self._replay or self._capture()
        seconds = self._device.elapsed(self._replay.launch)
        self._device.synchronize()
        self.check()
        return ("stream" if isinstance(self._replay, _Enqueue) else "cuda-graph"), seconds()

    def _capture(self) -> Replay | _Enqueue:
        """Warm up, then capture. If that is not possible, the work is enqueued again each time.

        All graphs are bound before the first of them runs, so that their working memory is allocated once.
        """
        self._decodes = self._decodes or [self._bind_decode(k) for k in range(len(self._parts))]
        if not self._backend.captures:
            log.info("%s: its library cannot be captured, so a generation is enqueued each time", self._backend.name)
            return _Enqueue(self._enqueue)
        for _ in range(WARM_UPS):
            self._enqueue()
            self._device.synchronize()
        try:
            return self._device.capture(self._enqueue)
        except OutOfMemory:
            raise
        except FlexVARError as error:
            log.warning(
                "%s: this generation cannot be captured as a CUDA graph, so it is enqueued kernel by kernel: %s",
                self._backend.name,
                error.got,
            )
            return _Enqueue(self._enqueue)

    def _enqueue(self) -> None:
        self._device.zero(self._result["status"])
        for i in range(len(self.shape.schedule)):
            self.enqueue_scale(i)
            self.enqueue_draws(i)
        self._enqueue_decode()
        self._device.read(self._result.host_whole, self._result.whole)

    def enqueue_scale(self, i: int) -> None:
        """From the tokens of the scale before to the guided logits of scale i."""
        if i:
            self._device.launch(self._next_inputs(i))
        self._steps[i].run()

    def prefill(self, graph: Graph, given: Sequence[Tokens]) -> None:
        """Compute keys and values of the first scales from their tokens (B, h, w), in one pass, and wait.

        An edit is not replayed, so its inputs are computed on the host.
        """
        first = self._backend.download(self._first_input)
        arrays = prefill_inputs(self._shared.tables, given, self.shape.schedule.scales[: len(given)], first)
        inputs, outputs = self.tensors.prefill(graph.spec, *map(self._backend.upload, arrays))
        graph.run(inputs, outputs)
        self._device.synchronize()  # `inputs` are freed next

    def enqueue_draws(self, i: int) -> None:
        """From the logits of scale i to its tokens."""
        h, w = self.shape.schedule[i]
        launch = kernels.sample_rows(
            self.tensors.logits_of(h * w),
            self._request["streams"],
            self._result[f"tokens_{i}"],
            self._result["status"],
            self._request["top_k"][i],
            self._request["drop"],
            scale=i,
        )
        self._device.launch(launch)

    def _enqueue_decode(self) -> None:
        """From the tokens of the last scale to pixels."""
        tokens = self._result[f"tokens_{len(self.shape.schedule) - 1}"]
        for k, (part, decode) in enumerate(zip(self._parts, self._decodes, strict=True)):
            self._device.copy(self._work[f"last_{k}"], tokens[part.start : part.stop])
            decode.run()
            image, pixels = self._work[f"image_{k}"], self._result["pixels"][part.start : part.stop]
            self._device.launch(kernels.to_uint8(image, pixels, self._result["status"], self._facts.value_range))

    def tokens_on_device(self, i: int) -> DeviceArray:
        return self._result[f"tokens_{i}"]

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """Tokens (B, h, w) of every scale of the last replay."""
        return tuple(self._result.host[f"tokens_{i}"].copy() for i in range(len(self.shape.schedule)))

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Pixels (B, H, W, 3) of the last replay."""
        return self._result.host["pixels"].copy()

    def decoded(self) -> Float32:
        """The decoder's images (B, 3, H, W) of the last replay. Waits for the copy."""
        parts = [self._backend.download(self._work[f"image_{k}"]) for k in range(len(self._parts))]
        return np.concatenate(parts)

    def download_tokens(self, i: int) -> Tokens:
        """Tokens of scale i. Waits for the copy. Raises ArtifactRefused for logits that are not finite."""
        host = self._result.host
        self._device.read(host[f"tokens_{i}"], self._result[f"tokens_{i}"])
        self._device.read(host["status"], self._result["status"])
        self._device.synchronize()
        self.check()
        return host[f"tokens_{i}"].copy()

    def check(self) -> None:
        """Raise ArtifactRefused if a kernel found values that are not finite before the last download."""
        problem = kernels.read_status(self._result.host["status"])
        if problem is None:
            return
        if problem.kind == "logits":
            size = self.shape.schedule[problem.scale]
            raise refuse_logits(problem.scale, size, f"Row {problem.row} of the logits has no finite maximum.")
        raise refuse_pixels()

    def _write_constants(self) -> None:
        B, work, tables = self.shape.images, self._work, self._shared.tables
        rows = np.arange(B, dtype=np.int32)
        constants: dict[str, NDArray[Any]] = {
            "cond_rows": rows,
            "uncond_rows": rows + np.int32(B if self.shape.guided else 0),
            "no_codes": np.zeros(work["no_codes"].shape, np.float32),
        }
        for i, (before, size) in enumerate(pairwise(self.shape.schedule), start=1):
            constants[f"positions_{i}"] = tables.offset(*size)
            for axis, old, new in zip("yx", before, size, strict=True):
                taps = kernels.taps(bicubic_matrix(old, new))
                constants[f"{axis}_index_{i}"], constants[f"{axis}_weight_{i}"] = taps
        constants = {name: np.ascontiguousarray(value) for name, value in constants.items()}
        for name, value in constants.items():
            self._device.write(work[name], value)
        self._device.synchronize()  # `constants` are freed next

    def _next_inputs(self, i: int) -> Launch:
        work = self._work
        return kernels.next_inputs(
            self._result[f"tokens_{i - 1}"],
            self._shared.codebook,
            (work[f"y_index_{i}"], work[f"y_weight_{i}"]),
            (work[f"x_index_{i}"], work[f"x_weight_{i}"]),
            work[f"positions_{i}"],
            *self._codes_and_offset(i),
        )

    def _codes_and_offset(self, i: int) -> tuple[DeviceArray, DeviceArray]:
        """codes (N, L, D) and offset (N, L, C) of scale i. The first scale has no codes, only the class."""
        if i == 0:
            return self._work["no_codes"], self._first_input
        (h, w), N = self.shape.schedule[i], self.shape.sequences
        D, C = self._facts.code_dim, self._facts.width
        codes = self._work["codes"][: N * h * w * D].reshape(N, h * w, D)
        return codes, self._work["offset"][: N * h * w * C].reshape(N, h * w, C)

    def _bind_step(self, i: int) -> Bound:
        h, w = self.shape.schedule[i]
        past = sum(a * b for a, b in self.shape.schedule.scales[:i])
        inputs, outputs = self.tensors.step(*self._codes_and_offset(i), self._request[f"t_{i}"], past, h * w)
        return self._shared.open_graph(STEP).bind(inputs, outputs)

    def _bind_decode(self, k: int) -> Bound:
        tokens, image = self._work[f"last_{k}"], self._work[f"image_{k}"]
        return self._shared.open_graph(DECODE).bind({"tokens": tokens}, {"image": image})


class _Enqueue:
    """The substitute for a captured graph: it enqueues the work again."""

    def __init__(self, enqueue: Callable[[], None]) -> None:
        self.launch = enqueue

    def close(self) -> None:
        """Nothing to free."""
