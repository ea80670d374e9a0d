"""A whole generation on a device: every scale, the draws, the next inputs, the decoder, as one captured graph.

    request (labels' rows, guidance, seed) ──> [ next_inputs ─> step ─> sample_rows ] per scale ─> decode ─> to_uint8

`DeviceGeneration` owns the buffers of one (schedule, images, guided) and enqueues it; nothing in it waits.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Bound, Graph
from ..conditions import RowGroup, tensors
from ..errors import FlexVARError, OutOfMemory
from ..graphs import DECODE, STEP, new_names, past_names
from ..images import refuse_pixels
from ..loop import Draws, refuse_logits, scale_of_tokens
from ..manifest import ModelFacts
from ..planner import IMAGES_PER_RUN
from ..resize import bicubic_matrix
from ..schedule import ScaleSchedule
from ..tables import Tables
from . import kernels
from .array import DeviceArray
from .buffers import Arena, Shape, condition_name, decode_parts, request_fields, result_fields, work_fields
from .conditions import ConditionStore
from .device import Device, Replay

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]
WARM_UPS = 2  # before a capture: in the first, engines settle on their shapes; the second runs as the captured one
REPLAYS_KEPT = 4  # captured graphs of one shape: as many options as are in use at a time


@dataclass(frozen=True)
class Options:
    """What a captured generation holds fast beside its shape: top-k of every scale, and top-p."""

    top_k: tuple[int, ...]
    top_p: float

    @classmethod
    def of(cls, draws: Draws, schedule: ScaleSchedule) -> Options:
        return cls(tuple(draws.sampling.top_k_at(h, w) for h, w in schedule), draws.sampling.top_p)


class DeviceGeneration:
    """The buffers of one shape on the device, every graph bound to them, and the generations captured from it."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        model: ModelFacts,
        tables: Tables,
        shape: Shape,
        kv_dtype: str,
        groups: tuple[RowGroup, ...],
        codebook: DeviceArray,
        open_graph: Callable[[str], Graph],
    ) -> None:
        self.shape = shape
        self._backend, self._device, self._model, self._codebook = backend, device, model, codebook
        self._open, self._tables = open_graph, tables
        self._parts = decode_parts(shape.images, IMAGES_PER_RUN)
        self._request = Arena(device, request_fields(shape), pinned=True)
        self._result = Arena(device, result_fields(model, shape), pinned=True)
        self._work = Arena(device, work_fields(model, shape, kv_dtype, groups, self._parts))
        self._condition_buffers = [self._work[condition_name(g)] for g in range(len(groups))]
        self._modulation: dict[str, DeviceArray] = tensors(groups, self._condition_buffers)
        self._first_input = self._modulation.pop("first_input")
        self._write_constants(tables)
        self._steps = [self._bind_step(i) for i in range(len(shape.schedule))]
        self._decodes: list[Bound] = []
        self._replays: OrderedDict[Options, Replay | _Enqueue] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return self._request.nbytes + self._result.nbytes + self._work.nbytes

    def close(self) -> None:
        """Free graphs and bindings; the device must be idle."""
        for replay in self._replays.values():
            replay.close()
        for bound in (*self._steps, *self._decodes):
            bound.close()
        self._replays.clear()  # what is enqueued refers back to this
        self._steps, self._decodes = [], []

    def begin(self, conditions: ConditionStore, labels: Sequence[int], weights: Sequence[float]) -> None:
        """Enqueue what a request decides: condition rows of every sequence, guidance of every scale.

        The device must be idle: the pinned block is written here.
        """
        null = [self._model.null_class] * len(labels) if self.shape.guided else []
        host = self._request.host
        host["slots"][:] = conditions.slots([*labels, *null])
        for i, t in enumerate(weights):
            host[f"t_{i}"][:] = t
        self._device.write(self._request.whole, self._request.host_whole)
        conditions.gather(self._request["slots"], self._condition_buffers)
        self._device.zero(self._result["status"])

    def seed(self, draws: Draws) -> None:
        """Set the random streams for the next `begin`."""
        self._request.host["streams"][:] = kernels.stream_block(draws.seed, draws.indices)

    def replay(self, options: Options) -> tuple[str, float]:
        """Run the whole generation, captured the first time; waits. Returns how it ran and its seconds on the device.

        Its results are then in `tokens` and `pixels`. Raises ArtifactRefused for logits or pixels that are not finite.
        """
        replay = self._replays.get(options) or self._capture(options)
        self._replays[options] = replay
        self._replays.move_to_end(options)
        while len(self._replays) > REPLAYS_KEPT:
            self._replays.popitem(last=False)[1].close()
        seconds = self._device.elapsed(replay.launch)
        self._device.synchronize()
        self.check()
        return ("stream" if isinstance(replay, _Enqueue) else "cuda-graph"), seconds()

    def _capture(self, options: Options) -> Replay | _Enqueue:
        """Warm up, then capture. Where that cannot be, the work is enqueued anew each time."""
        enqueue = partial(self._enqueue, options)
        if not self._backend.captures:
            log.info("%s: a generation is enqueued, its library cannot be captured as a whole", self._backend.name)
            return _Enqueue(enqueue)
        for _ in range(WARM_UPS):
            enqueue()
            self._device.synchronize()
        try:
            return self._device.capture(enqueue)
        except OutOfMemory:
            raise
        except FlexVARError as error:
            log.warning(
                "%s: this generation cannot be captured as a CUDA graph and is enqueued kernel by kernel (%s)",
                self._backend.name,
                error.got,
            )
            return _Enqueue(enqueue)

    def _enqueue(self, options: Options) -> None:
        self._device.zero(self._result["status"])
        for i in range(len(self.shape.schedule)):
            self.enqueue_scale(i)
            self.enqueue_draws(i, options)
        self.enqueue_decode()
        self._device.read(self._result.host_whole, self._result.whole)

    def enqueue_scale(self, i: int) -> None:
        """From the tokens of the scale before to the guided logits of scale i."""
        if i:
            self._device.launch(self._next_inputs(i))
        self._steps[i].run()

    def prefill(self, graph: Graph, tokens: Sequence[Tokens]) -> None:
        """Keys and values of the first scales from their tokens (B, h, w), in one pass; waits.

        What no captured work needs is computed on the host: an edit is not replayed.
        """
        sizes, N = self.shape.schedule.scales[: len(tokens)], self.shape.sequences
        repeats = N // self.shape.images
        first = self._backend.download(self._first_input)
        codes, offsets = [np.zeros((N, 1, self._model.code_dim), np.float32)], [first]
        for scale, size in zip(tokens, sizes[1:], strict=False):
            codes.append(np.tile(self._tables.next_codes(scale, size), (repeats, 1, 1)))
            offsets.append(np.broadcast_to(self._tables.offset(*size), (N, size[0] * size[1], first.shape[2])))
        joined = np.concatenate(codes, axis=1)
        L, cache = joined.shape[1], self._work["cache"]
        inputs = {
            "codes": self._backend.upload(joined),
            "offset": self._backend.upload(np.concatenate(offsets, axis=1)),
            **{t.name: self._modulation[t.name] for t in graph.spec.inputs if t.name in self._modulation},
            "scale": self._backend.upload(scale_of_tokens(sizes)),
        }
        graph.run(inputs, {name: cache[block][:L] for block, name in enumerate(new_names(self._model.depth))})
        self._device.synchronize()  # `inputs` are dropped

    def enqueue_draws(self, i: int, options: Options) -> None:
        """From the logits of scale i to its tokens."""
        h, w = self.shape.schedule[i]
        launch = kernels.sample_rows(
            self.logits(i),
            self._request["streams"],
            self._result[f"tokens_{i}"],
            self._result["status"],
            scale=i,
            top_k=options.top_k[i],
            top_p=options.top_p,
        )
        self._device.launch(launch)

    def enqueue_decode(self) -> None:
        """From the tokens of the last scale to pixels."""
        self._decodes = self._decodes or [self._bind_decode(k) for k in range(len(self._parts))]
        tokens = self._result[f"tokens_{len(self.shape.schedule) - 1}"]
        for k, (part, decode) in enumerate(zip(self._parts, self._decodes, strict=True)):
            self._device.copy(self._work[f"last_{k}"], tokens[part.start : part.stop])
            decode.run()
            image, pixels = self._work[f"image_{k}"], self._result["pixels"][part.start : part.stop]
            self._device.launch(kernels.to_uint8(image, pixels, self._result["status"], self._model.value_range))

    def logits(self, i: int) -> DeviceArray:
        """(B, h·w, V) float32 of scale i, in the buffer all scales share."""
        h, w = self.shape.schedule[i]
        B, V = self.shape.images, self._model.vocabulary
        return self._work["logits"][: B * h * w * V].reshape(B, h * w, V)

    def tokens_on_device(self, i: int) -> DeviceArray:
        return self._result[f"tokens_{i}"]

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """Of every scale, as last downloaded."""
        return tuple(self._result.host[f"tokens_{i}"].copy() for i in range(len(self.shape.schedule)))

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(B, H, W, 3), as last downloaded."""
        return self._result.host["pixels"].copy()

    def decoded(self) -> Float32:
        """The decoder's images (B, 3, H, W) of the last replay; waits."""
        parts = [self._backend.download(self._work[f"image_{k}"]) for k in range(len(self._parts))]
        return np.concatenate(parts)

    def download_tokens(self, i: int) -> Tokens:
        """Tokens of scale i; waits, and refuses what the sampler refused."""
        host = self._result.host
        self._device.read(host[f"tokens_{i}"], self._result[f"tokens_{i}"])
        self._device.read(host["status"], self._result["status"])
        self._device.synchronize()
        self.check()
        return host[f"tokens_{i}"].copy()

    def check(self) -> None:
        """Raise ArtifactRefused for what the kernels marked as not finite, as last downloaded."""
        problem = kernels.read_status(self._result.host["status"])
        if problem is None:
            return
        if problem.kind == "logits":
            size = self.shape.schedule[problem.scale]
            raise refuse_logits(problem.scale, size, f"row {problem.row} of the logits without a finite maximum")
        raise refuse_pixels()

    def _write_constants(self, tables: Tables) -> None:
        B = self.shape.images
        rows = np.arange(B, dtype=np.int32)
        constants: dict[str, NDArray[Any]] = {
            "cond_rows": rows,
            "uncond_rows": rows + np.int32(B if self.shape.guided else 0),
            "no_codes": np.zeros(self._work["no_codes"].shape, np.float32),
        }
        for i, (before, size) in enumerate(pairwise(self.shape.schedule), start=1):
            constants[f"positions_{i}"] = tables.offset(*size)
            for axis, old, new in zip("yx", before, size, strict=True):
                taps = kernels.taps(bicubic_matrix(old, new))
                constants[f"{axis}_index_{i}"], constants[f"{axis}_weight_{i}"] = taps
        constants = {name: np.ascontiguousarray(value) for name, value in constants.items()}
        for name, value in constants.items():
            self._device.write(self._work[name], value)
        self._device.synchronize()  # `constants` are dropped

    def _next_inputs(self, i: int) -> kernels.Launch:
        codes, offset = self._inputs(i)
        work = self._work
        return kernels.next_inputs(
            self._result[f"tokens_{i - 1}"],
            self._codebook,
            (work[f"y_index_{i}"], work[f"y_weight_{i}"]),
            (work[f"x_index_{i}"], work[f"x_weight_{i}"]),
            work[f"positions_{i}"],
            codes,
            offset,
        )

    def _inputs(self, i: int) -> tuple[DeviceArray, DeviceArray]:
        """codes (N, L, D) and offset (N, L, C) of scale i: the first scale has no codes, only the class."""
        if i == 0:
            return self._work["no_codes"], self._first_input
        (h, w), N = self.shape.schedule[i], self.shape.sequences
        D, C = self._model.code_dim, self._model.width
        codes = self._work["codes"][: N * h * w * D].reshape(N, h * w, D)
        return codes, self._work["offset"][: N * h * w * C].reshape(N, h * w, C)

    def _bind_step(self, i: int) -> Bound:
        h, w = self.shape.schedule[i]
        L, P = h * w, sum(a * b for a, b in self.shape.schedule.scales[:i])
        codes, offset = self._inputs(i)
        work, cache, depth = self._work, self._work["cache"], self._model.depth
        inputs = {
            "codes": codes,
            "offset": offset,
            **self._modulation,
            "cond_rows": work["cond_rows"],
            "uncond_rows": work["uncond_rows"],
            "t": self._request[f"t_{i}"],
        }
        outputs = {"logits": self.logits(i)}
        for block, (past, new) in enumerate(zip(past_names(depth), new_names(depth), strict=True)):
            inputs[past], outputs[new] = cache[block][:P], cache[block][P : P + L]
        return self._open(STEP).bind(inputs, outputs)

    def _bind_decode(self, k: int) -> Bound:
        return self._open(DECODE).bind({"tokens": self._work[f"last_{k}"]}, {"image": self._work[f"image_{k}"]})


class _Enqueue:
    """In the place of a captured graph where capturing is refused."""

    def __init__(self, enqueue: Callable[[], None]) -> None:
        self.launch = enqueue

    def close(self) -> None:
        pass
