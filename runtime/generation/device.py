"""The generator on a device: buffers and captured graphs by shape, and conditions in device memory."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from traceback import clear_frames
from typing import TypeVar, cast

from ..backends.base import Array
from ..backends.device_arrays import DeviceBackend
from ..bundle.opening import Bundle
from ..cuda import kernels
from ..cuda.array import ALIGNMENT, DeviceArray
from ..cuda.device import ignore_errors
from ..cuda.kernels import KernelConfig
from ..errors import OutOfMemory
from ..machine.forks import never_free
from ..memory.plan import IMAGES_PER_RUN, largest_batch
from ..model.signatures import CONDITION, DECODE, STEP
from ..model.tensors import host_dtype
from ..request import Request, Shape
from .captured import CapturedGeneration, DeviceModel
from .conditions import ConditionCache
from .device_loop import DeviceLoop
from .device_memory import generation_bytes, refuse_shape
from .generator import Generator, condition_graph

log = logging.getLogger(__name__)

Result = TypeVar("Result")
CLASSES_KEPT = 64  # classes whose condition is kept in device memory (0.4 MB each for d16)
SHAPES_KEPT = 4


class DeviceConditions(ConditionCache):
    """Conditions in device memory."""

    _backend: DeviceBackend

    def gather(self, slots: Array, targets: Sequence[Array]) -> None:
        """Enqueue the copies."""
        for buffer, target in zip(self._buffers, targets, strict=True):
            self._backend.device.launch(kernels.gather_rows(buffer, slots, target))

    def _scatter(self, computed: Sequence[Array], slots: Array) -> None:
        for buffer, rows in zip(self._buffers, computed, strict=True):
            self._backend.device.launch(kernels.scatter_rows(rows, slots, buffer))
        self._backend.device.synchronize()  # `computed` and `slots` are freed next


class DeviceGenerator(Generator):
    """Runs requests on a device: as a whole, from a captured graph where the backend allows it, or scale by scale.

    It keeps the buffers and captured graphs of the shapes that were used last, and of those that `pin` names.
    """

    backend: DeviceBackend
    runs_whole = True

    def __init__(self, bundle: Bundle, backend: DeviceBackend, shapes_kept: int = SHAPES_KEPT) -> None:
        """shapes_kept: how many shapes to keep beside the pinned ones."""
        super().__init__(bundle, backend)
        self.device, self._shapes_kept = backend.device, shapes_kept
        self._kv_dtype = bundle.manifest.precision.dtype
        self.device.activate()
        self.device.load(KernelConfig(self.model.vocabulary, self.model.code_dim, self.model.width))
        codebook: DeviceArray = backend.upload(self.tables.codebook)
        open_condition = partial(condition_graph, backend, bundle, self._graphs)
        null = self.model.null_class
        self._conditions = DeviceConditions(backend, bundle.graph(CONDITION), null, CLASSES_KEPT, open_condition)
        self._shared = DeviceModel(
            backend, self.model, self.tables, codebook, self._conditions, self._kv_dtype, self.graph
        )
        self._spare: OrderedDict[Shape, CapturedGeneration] = OrderedDict()
        self._pinned: set[Shape] = set()

    @property
    def hardware(self) -> str:
        return self.device.name

    @contextmanager
    def loop(self, request: Request) -> Iterator[DeviceLoop]:
        self.require_open()
        with self._generation(self._shape(request)) as generation:
            yield DeviceLoop(self, self.device, request, generation)

    def pin(self, request: Request) -> None:
        self._pinned.add(self._shape(request))

    def _release(self) -> None:
        """Free everything, also after the device has failed."""
        with ignore_errors("closing the generations"):
            self.device.activate()
            self.device.synchronize()
        while self._spare:
            with ignore_errors("closing a generation"):
                self._spare.popitem()[1].close()
        self._conditions.clear()
        del self._shared  # the codebook
        with ignore_errors("freeing memory"):
            self.device.trim()

    def _most_images(self, graph: str, size: tuple[int, int]) -> int:
        return min(IMAGES_PER_RUN, self.graph(graph).most_images or IMAGES_PER_RUN)

    def bytes_of(self, shape: Shape) -> int:
        """Exact bytes of the buffers of a shape."""
        return generation_bytes(self.model, shape, self._kv_dtype, self._conditions.groups)

    def _bytes_with_work(self, shape: Shape) -> int:
        """Bytes of the buffers of a shape, and of the working memory that its graphs must still allocate."""
        (h, w), new = shape.schedule[-1], shape.schedule.largest
        step = {"sequences": shape.sequences, "images": shape.images, "new": new, "past": 0}
        decode = {"images": min(shape.images, IMAGES_PER_RUN), "height": h, "width": w}
        working = max(self.graph(STEP).working_bytes(step), self.graph(DECODE).working_bytes(decode))
        return self.bytes_of(shape) + working

    @contextmanager
    def _generation(self, shape: Shape) -> Iterator[CapturedGeneration]:
        """The buffers of a shape, for one user at a time."""
        self.device.activate()
        generation = self._spare.pop(shape, None) or self._allocate(shape)
        try:
            yield generation
        finally:
            if self.inherited:
                never_free(generation)
            else:
                self._put_back(shape, generation)

    def _put_back(self, shape: Shape, generation: CapturedGeneration) -> None:
        """Keep the buffers for the next request of their shape, and free those that are too many."""
        unused = self._spare.pop(shape, None)  # of a second loop over this shape at the same time
        if self.closed or (unused is not None and unused.warm):
            generation, unused = cast(CapturedGeneration, unused), generation
        if unused is not None:
            self.device.synchronize()
            unused.close()
        if not self.closed:
            self._spare[shape] = generation
            self._drop(self._shapes_kept)

    def _shape(self, request: Request) -> Shape:
        """The shape that a request runs in. If the keys of one token would not end on an aligned address, a second
        branch with weight 0 makes them."""
        shape = request.shape
        row = shape.sequences * self.model.heads * self.model.head_size * host_dtype(self._kv_dtype).itemsize
        if row % ALIGNMENT == 0 or shape.guided:
            return shape
        log.debug("%d images without guidance run with a second branch, to align their keys", shape.images)
        return replace(shape, guided=True)

    def _allocate(self, shape: Shape) -> CapturedGeneration:
        for graph in (CONDITION, STEP, DECODE):  # their weights must be counted in the free memory
            self.graph(graph)
        needed = self._bytes_with_work(shape)
        while self._droppable() and needed > self.device.free_bytes():
            self._drop(len(self._droppable()) - 1)
        available = self.device.free_bytes()
        if needed > available:
            fits = largest_batch(lambda images: self._bytes_with_work(replace(shape, images=images)), available)
            beside = f" beside {len(self._spare)} warm shape{'s' * (len(self._spare) > 1)}" if self._spare else ""
            raise refuse_shape(shape, needed, available, self.device.name, fits, beside)
        return self.attempt(partial(CapturedGeneration, self._shared, shape))

    def attempt(self, action: Callable[[], Result]) -> Result:
        """Run an action. If memory runs out, free the shapes that nobody uses or has pinned, and run it once more.

        Raises OutOfMemory if it runs out again.
        """
        try:
            return _clearing_frames(action)
        except OutOfMemory as error:
            log.info("%s Unused buffers are freed, then it runs once more.", error.got)
        self._drop(0)
        self.backend.free_unused()
        self.device.trim()
        return _clearing_frames(action)

    def _droppable(self) -> list[Shape]:
        """Shapes that nobody uses and that are not pinned, the one unused longest first."""
        return [shape for shape in self._spare if shape not in self._pinned]

    def _drop(self, kept: int) -> None:
        """Free droppable shapes, those unused longest first, until `kept` are left. Their memory goes to the driver."""
        dropped = self._droppable()[: max(0, len(self._droppable()) - kept)]
        if not dropped:
            return
        self.device.synchronize()
        for shape in dropped:
            self._spare.pop(shape).close()
        self.device.trim()


def _clearing_frames(action: Callable[[], Result]) -> Result:
    """Run an action. If it runs out of memory, clear the local variables in its traceback.

    They refer to buffers, which would stay in memory as long as somebody keeps the error.
    """
    try:
        return action()
    except OutOfMemory as error:
        clear_frames(error.__traceback__)
        raise
