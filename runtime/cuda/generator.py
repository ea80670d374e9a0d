"""Generations of one bundle on one device: buffers by shape, captured graphs in them, conditions remembered."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import clear_frames
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Graph, host_dtype
from ..conditions import row_groups
from ..errors import InvalidInput, OutOfMemory
from ..graphs import CONDITION, DECODE, DTYPE_OF_PRECISION, STEP
from ..guidance import Guidance
from ..loop import Draws, Loop
from ..manifest import GraphSpec, ModelFacts
from ..planner import largest_batch
from ..schedule import ScaleSchedule
from ..tables import Tables
from .array import ALIGNMENT, DeviceArray
from .buffers import Shape
from .conditions import ConditionStore
from .device import Device, going_on
from .device_plan import generation_bytes
from .generation import DeviceGeneration, Options
from .kernels import KernelConfig
from .loop import DeviceLoop

log = logging.getLogger(__name__)

Result = TypeVar("Result")
SHAPES_KEPT = 4


@dataclass(frozen=True)
class Replayed:
    """One whole generation: tokens of every scale, pixels (B, H, W, 3), how it ran ("cuda-graph", or "stream" where
    capturing was refused), and its seconds on the device; decoded (B, 3, H, W) where it was asked for."""

    tokens: tuple[NDArray[np.int32], ...]
    pixels: NDArray[np.uint8]
    mode: str
    seconds: float
    decoded: NDArray[np.float32] | None


class DeviceGenerator:
    """Runs requests on a device, scale by scale or as a whole."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        model: ModelFacts,
        precision: str,
        tables: Tables,
        condition: GraphSpec,
        open_graph: Callable[[str], Graph],
        open_prefill: Callable[[], Graph | None],
    ) -> None:
        self._open_prefill = open_prefill
        self._backend, self._device, self._model, self._tables = backend, device, model, tables
        self._groups = row_groups(condition)
        self._kv_dtype, self._open = DTYPE_OF_PRECISION[precision], open_graph
        device.activate()
        device.load(KernelConfig(model.vocabulary, model.code_dim, model.width))
        self._codebook: DeviceArray = backend.upload(tables.codebook)
        self._conditions = ConditionStore(backend, device, model, self._groups, open_graph)
        self._spare: OrderedDict[Shape, DeviceGeneration] = OrderedDict()
        self._closed = False

    def close(self) -> None:
        """Free everything, also after the device has failed."""
        self._closed = True
        with going_on("closing the generations"):
            self._device.activate()
            self._device.synchronize()
        while self._spare:
            with going_on("closing a generation"):
                self._spare.popitem()[1].close()
        self._conditions.clear()
        with going_on("giving memory back"):
            self._device.trim()

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidInput("a closed pipeline", expected="an open one", fix="open the bundle again")

    @contextmanager
    def loop(self, labels: Sequence[int], schedule: ScaleSchedule, guidance: Guidance) -> Iterator[Loop]:
        """A loop over `schedule`, one image a label."""
        weights = guidance.weights(schedule)
        with self._generation(schedule, len(labels), weights) as generation:
            yield DeviceLoop(
                generation,
                self._device,
                self._backend,
                self._conditions,
                labels,
                weights,
                self._require_open,
                self._open_prefill,
                self.retry_after_freeing,
            )

    def replay(
        self,
        labels: Sequence[int],
        schedule: ScaleSchedule,
        guidance: Guidance,
        draws: Draws,
        keep_decoded: bool = False,
    ) -> Replayed:
        """A whole generation with one wait, at its end. Captured the first time a (shape, options) is asked for."""
        weights = guidance.weights(schedule)
        with self._generation(schedule, len(labels), weights) as generation:

            def run() -> tuple[str, float]:
                generation.seed(draws)
                generation.begin(self._conditions, labels, weights)
                return generation.replay(Options.of(draws, schedule))

            mode, seconds = self.retry_after_freeing(run)
            decoded = generation.decoded() if keep_decoded else None
            return Replayed(generation.tokens, generation.pixels, mode, seconds, decoded)

    def bytes_of(self, shape: Shape) -> int:
        """Device memory of the buffers of a shape, exactly."""
        return generation_bytes(self._model, shape, self._kv_dtype, self._groups)

    @contextmanager
    def _generation(self, schedule: ScaleSchedule, images: int, weights: Sequence[float]) -> Iterator[DeviceGeneration]:
        """Buffers of a shape for one user at a time; the ones longest unused make room."""
        self._device.activate()
        shape = Shape(schedule, images, any(t != 0 for t in weights) or self._misaligned(images))
        generation = self._spare.pop(shape, None) or self._allocate(shape)
        try:
            yield generation
        finally:
            if self._closed:
                generation.close()
            else:
                self._spare[shape] = generation
                self._drop(SHAPES_KEPT)

    def _misaligned(self, images: int) -> bool:
        """Whether keys of one token would not end on an aligned address: a second branch, weighted 0, makes them."""
        row = images * self._model.heads * self._model.head_size * host_dtype(self._kv_dtype).itemsize
        if row % ALIGNMENT:
            log.debug("%d images without guidance run with a second branch, for the alignment of their keys", images)
        return row % ALIGNMENT != 0

    def _allocate(self, shape: Shape) -> DeviceGeneration:
        for graph in (CONDITION, STEP, DECODE):  # their weights are counted by what is left
            self._open(graph)
        needed = self.bytes_of(shape)
        while self._spare and needed > self._device.free_bytes():
            self._drop(len(self._spare) - 1)
        available = self._device.free_bytes()
        if needed > available:
            fits = largest_batch(lambda n: self.bytes_of(Shape(shape.schedule, n, shape.guided)), available)
            raise OutOfMemory(
                f"a batch of {shape.images} at schedule {shape.schedule} that needs {needed / 2**30:.1f} GiB "
                f"on {self._device.name}",
                expected=f"at most {available / 2**30:.1f} GiB",
                fix=f"use a batch of at most {fits}" if fits else "use a smaller schedule, or free the GPU",
            )
        build = partial(
            DeviceGeneration,
            self._backend,
            self._device,
            self._model,
            self._tables,
            shape,
            self._kv_dtype,
            self._groups,
            self._codebook,
            self._open,
        )
        return self.retry_after_freeing(build)

    def retry_after_freeing(self, action: Callable[[], Result]) -> Result:
        """Run an action. If memory runs out, free the shapes that nobody uses and run it once more.

        Raises OutOfMemory if it runs out again.
        """
        try:
            return _clearing_frames(action)
        except OutOfMemory as error:
            log.info("%s: unused buffers are freed, then it is tried once more", error.got)
        self._drop(0)
        self._device.trim()
        return _clearing_frames(action)

    def _drop(self, kept: int) -> None:
        """Free the shapes longest unused, down to `kept`, and give their memory back to the driver."""
        if len(self._spare) <= kept:
            return
        self._device.synchronize()
        while len(self._spare) > kept:
            self._spare.popitem(last=False)[1].close()
        self._device.trim()


def _clearing_frames(action: Callable[[], Result]) -> Result:
    """Run an action. If it runs out of memory, clear the local variables in its traceback.

    They refer to buffers, which would stay in memory as long as somebody keeps the error.
    """
    try:
        return action()
    except OutOfMemory as error:
        clear_frames(error.__traceback__)
        raise
