"""The generator on the host: scale by scale, with draws and next inputs computed in NumPy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Array, Graph
from ..backends.host_arrays import HostBackend, processor_name
from ..bundle.opening import Bundle
from ..errors import InvalidInput
from ..memory.plan import CLASSES_KEPT, MemoryPlan, batch_that_fits, plan, require_fits
from ..model.facts import ModelFacts
from ..model.sampling import sample
from ..model.signatures import CONDITION, STEP
from ..model.tables import Tables
from ..output import ScaleTime
from ..request import Request, Shape
from .conditions import ConditionCache
from .generator import Generator, condition_graph
from .scale_loop import ScaleLoop, StepTensors, prefill_inputs, refuse_logits

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class LoopBuffers:
    """The buffers of one shape. The next request of that shape uses them again.

    cache, logits: see `StepTensors`. offsets: position embedding and bias of every scale after the first, (h·w, C).
    """

    shape: Shape
    cache: Array
    logits: Array
    offsets: tuple[Float32, ...]

    @classmethod
    def allocate(
        cls, backend: HostBackend, kv_dtype: str, model: ModelFacts, tables: Tables, shape: Shape
    ) -> LoopBuffers:
        """Raises OutOfMemory. Whether they fit is checked before."""
        schedule, cache = shape.schedule, (shape.schedule.tokens, shape.sequences, model.heads, model.head_size)
        return cls(
            shape,
            backend.empty((2 * model.depth, *cache), kv_dtype),
            backend.empty((shape.images * schedule.largest * model.vocabulary,), "float32"),
            tuple(tables.offset(h, w) for h, w in schedule.scales[1:]),
        )


class HostConditions(ConditionCache):
    """Conditions in NumPy arrays."""

    def gather(self, slots: Array, targets: Sequence[Array]) -> None:
        for buffer, target in zip(self._buffers, targets, strict=True):
            np.take(buffer, slots, axis=1, out=target)

    def _scatter(self, computed: Sequence[Array], slots: Array) -> None:
        for buffer, rows in zip(self._buffers, computed, strict=True):
            buffer[:, slots] = rows[:, : len(slots)]


class HostGenerator(Generator):
    """Runs requests on a backend whose arrays are NumPy arrays."""

    backend: HostBackend

    def __init__(self, bundle: Bundle, backend: HostBackend) -> None:
        super().__init__(bundle, backend)
        open_condition = partial(condition_graph, backend, bundle, self._graphs)
        null = self.model.null_class
        self._conditions = HostConditions(backend, bundle.graph(CONDITION), null, CLASSES_KEPT, open_condition)
        self._spare: LoopBuffers | None = None

    @property
    def hardware(self) -> str:
        return processor_name()

    @contextmanager
    def loop(self, request: Request) -> Iterator[HostLoop]:
        self.require_open()
        shape = request.shape
        buffers, self._spare = self._spare, None
        if buffers is None or buffers.shape != shape:
            buffers = None  # freed before asking how much memory is left
            self._require_fits(shape)
        null = [self.model.null_class] * (request.images if request.guided else 0)
        condition = self._conditions.rows([*request.labels, *null])
        step = self.graph(STEP)
        if buffers is None:
            buffers = LoopBuffers.allocate(
                self.backend, self.bundle.manifest.precision.dtype, self.model, self.tables, shape
            )
        try:
            yield HostLoop(self, request, step, buffers, condition)
        finally:
            self._spare = None if self.closed else buffers

    def pin(self, request: Request) -> None:
        """Nothing is kept: buffers of another shape are allocated in no time."""

    def _release(self) -> None:
        self._spare = None

    def memory_plan(self, shape: Shape) -> MemoryPlan:
        """The memory of a generation whose decoder runs one image at a time."""
        manifest = self.bundle.manifest
        libraries = self.backend.libraries(manifest.precision)
        return plan(manifest, shape.schedule, shape.images, shape.guided, libraries, decoded_at_once=1)

    def _require_fits(self, shape: Shape) -> None:
        def planned(images: int) -> MemoryPlan:
            return self.memory_plan(replace(shape, images=images))

        require_fits(planned, shape.images, self.backend.available_bytes(), self.opened(shape.schedule[-1]))

    def _most_images(self, graph: str, size: tuple[int, int]) -> int:
        manifest = self.bundle.manifest
        library = self.backend.libraries(manifest.precision)[graph]
        return batch_that_fits(manifest, graph, size, self.backend.available_bytes(), self.opened(size), library)

    def _has_room_for_prefill(self, request: Request) -> bool:
        wanted, available = self.memory_plan(request.shape), self.backend.available_bytes()
        needed = wanted.needed(self.opened(request.schedule[-1])) + wanted.weights[STEP]
        fits = available is None or needed <= available
        if not fits:
            log.info("given scales run one by one: there is no room for a second copy of the step's weights")
        return fits


class HostLoop(ScaleLoop):
    """The scales of one request on NumPy arrays."""

    def __init__(
        self,
        generator: HostGenerator,
        request: Request,
        step: Graph,
        buffers: LoopBuffers,
        condition: Mapping[str, Float32],
    ) -> None:
        super().__init__(request, generator.images)
        self._generator, self._tables, self._model = generator, generator.tables, generator.model
        self._upload: Callable[[NDArray[np.generic]], Array] = generator.backend.upload
        self._step, self._offsets, self._weights = step, buffers.offsets, request.weights()
        modulation = dict(condition)
        self._first_input = modulation.pop("first_input")
        rows = np.arange(request.images, dtype=np.int32)
        self.tensors = StepTensors(
            modulation,
            rows,
            rows + np.int32(request.images if request.guided else 0),
            buffers.cache,
            buffers.logits,
            self._model.vocabulary,
        )
        self._past = 0

    def inputs(self, scale: int, previous_Bhw: Tokens | None) -> dict[str, Array]:
        """Inputs of the step graph at a scale, after the scales before it."""
        return self._bindings(scale, previous_Bhw)[0]

    def _bindings(self, scale: int, previous_Bhw: Tokens | None) -> tuple[dict[str, Array], dict[str, Array]]:
        codes, offset = self._codes_and_offset(scale, previous_Bhw)
        h, w = self.request.schedule[scale]
        t = self._upload(self._weights[scale])
        return self.tensors.step(self._upload(codes), self._upload(offset), t, self._past, h * w)

    def logits(self, scale: int, previous_Bhw: Tokens | None) -> Float32:
        inputs, outputs = self._bindings(scale, previous_Bhw)
        self._step.run(inputs, outputs)
        logits: Float32 = outputs["logits"]
        self._past += logits.shape[1]
        return logits

    def _force(self, tokens: Sequence[Tokens]) -> None:
        prefill = self._generator.prefill_graph(self.request) if len(tokens) > 1 else None
        if prefill is None:
            for scale, previous in enumerate([None, *tokens[:-1]]):
                self.logits(scale, previous)
            return
        arrays = prefill_inputs(self._tables, tokens, self.request.schedule.scales[: len(tokens)], self._first_input)
        inputs, outputs = self.tensors.prefill(prefill.spec, *map(self._upload, arrays))
        prefill.run(inputs, outputs)
        self._past = arrays[0].shape[1]

    def _draw(self, scale: int) -> tuple[Tokens, ScaleTime]:
        request, (h, w) = self.request, self.request.schedule[scale]
        started = time.perf_counter()
        logits = self.logits(scale, self.tokens[-1] if scale else None).reshape(request.images * h * w, -1)
        stepped = time.perf_counter()
        try:
            drawn = sample(logits, request.noise(scale), top_k=request.top_k(scale), top_p=request.sampling.top_p)
        except InvalidInput as error:
            raise refuse_logits(scale, (h, w), error.got) from error
        tokens = drawn.reshape(request.images, h, w)
        if request.given is not None:
            tokens = request.given.put_back(scale, tokens)
        return tokens, ScaleTime((h, w), stepped - started, time.perf_counter() - stepped)

    def _codes_and_offset(self, scale: int, previous_Bhw: Tokens | None) -> tuple[Float32, Float32]:
        """codes (N, L, D) and offset (N, L, C). The first scale has no codes, only the class."""
        N = len(self._first_input)
        if previous_Bhw is None:
            return np.zeros((N, 1, self._model.code_dim), np.float32), self._first_input
        h, w = self.request.schedule[scale]
        codes = self._tables.next_codes(previous_Bhw, (h, w))
        offset = np.broadcast_to(self._offsets[scale - 1], (N, h * w, self._model.width))
        return np.concatenate([codes] * (N // len(codes))), offset
