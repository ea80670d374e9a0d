"""The base of both generators: the opened graphs of a bundle, its conditions, its decoder and encoder."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..backends import require_precision
from ..backends.base import Backend, Graph
from ..bundle.opening import Bundle
from ..errors import ArtifactRefused, InvalidInput
from ..machine.forks import never_free_in_children
from ..model.signatures import (
    CONDITION,
    DECODE,
    ENCODE,
    JOINED_MODULATION,
    PREFILL,
    REQUIRED,
    TABLES_FILE,
    graph_specs,
)
from ..model.tables import Tables
from ..pictures.pixels import require_finite, to_uint8
from ..request import Request
from .conditions import ConditionCache
from .scale_loop import ScaleLoop

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]
Pixels = NDArray[np.uint8]
Result = TypeVar("Result")


def require_known_graphs(bundle: Bundle) -> None:
    """Raise ArtifactRefused if a graph of a bundle has other tensors than this version knows."""
    manifest = bundle.manifest
    for name, spec in graph_specs(manifest.model, manifest.precision, manifest.schema_version).items():
        if name not in REQUIRED and name not in manifest.graphs:
            continue
        if bundle.graph(name) != spec:
            raise ArtifactRefused(
                f"The graph {name} has other inputs or outputs than a {manifest.precision} model of its size.",
                expected="the inputs and outputs that this version knows",
                fix="Export the bundle again with this version.",
            )
    if manifest.schema_version in JOINED_MODULATION:
        log.warning(
            "This bundle has schema version %d. A new export is faster, and only a new export runs on GPU backends "
            "without engines.",
            manifest.schema_version,
        )


@contextmanager
def condition_graph(backend: Backend, bundle: Bundle, graphs: dict[str, Graph]) -> Iterator[Graph]:
    """The condition graph, for some runs. graphs: those that are open, where it stays.

    If the backend maps its weights from the file, it is opened for these runs and then closed.
    """
    once: bool = getattr(backend, "maps_weights", False)  # of HostBackend
    graph = graphs.get(CONDITION) or backend.open(bundle, CONDITION, once=once)
    if not once:
        graphs[CONDITION] = graph
    try:
        yield graph
    finally:
        if once:
            graph.close()


class Generator(ABC):
    """Runs requests of one bundle on one backend. Graphs are opened when they are first used.

    `host.HostGenerator` runs scale by scale on NumPy arrays, `device.DeviceGenerator` on a GPU.
    """

    _conditions: ConditionCache

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        require_precision(backend.name, bundle.manifest.precision, backend.precisions)
        require_known_graphs(bundle)
        self.bundle, self.backend, self.model = bundle, backend, bundle.manifest.model
        with bundle.unchanged():
            self.tables = Tables.load(bundle.file(TABLES_FILE), self.model)
        self.closed = False
        self._process = os.getpid()
        never_free_in_children(self)
        self._owner = threading.RLock()
        self._graphs: dict[str, Graph] = {}

    runs_whole = False
    """Whether a generation runs as a whole if nobody watches its scales."""

    @property
    @abstractmethod
    def hardware(self) -> str:
        """The name of the processor or GPU."""

    @property
    def inherited(self) -> bool:
        """Whether this process inherited the generator from its parent by a fork. Then it can neither run nor be freed:
        the threads of the libraries stay in the parent."""
        return os.getpid() != self._process

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the generator for this thread, because its buffers belong to whoever runs.

        Raises InvalidInput, and at the end ArtifactRefused if the bundle was edited: weights are mapped from its files.
        """
        self._refuse_inherited()
        if not self._owner.acquire(blocking=False):
            raise InvalidInput(
                "Another thread is using this pipeline.",
                expected="one thread at a time",
                fix="Open a pipeline for each thread, or take turns with a lock.",
            )
        try:
            if self.backend.device is not None:
                self.backend.device.activate()
            yield
            self.bundle.require_unedited()
        finally:
            self._owner.release()

    @abstractmethod
    def loop(self, request: Request) -> AbstractContextManager[ScaleLoop]:
        """The scale loop of a request. Raises OutOfMemory before anything is opened that would not fit."""

    @abstractmethod
    def pin(self, request: Request) -> None:
        """Keep what was prepared for requests of this shape, whatever other shapes come."""

    @abstractmethod
    def _release(self) -> None:
        """Free buffers, before the graphs are closed."""

    @abstractmethod
    def _most_images(self, graph: str, size: tuple[int, int]) -> int:
        """The largest number of images of (h, w) tokens to decode or encode in one run."""

    def attempt(self, action: Callable[[], Result]) -> Result:
        """Run an action. A device frees memory and runs it once more if it runs out of memory."""
        return action()

    def _refuse_inherited(self) -> None:
        if self.inherited:
            raise InvalidInput(
                "This pipeline was opened before a fork, and only the parent process can use it.",
                expected="a pipeline of this process",
                fix="Open pipelines only in the child processes, or start these with spawn instead of fork.",
            )

    def require_open(self) -> None:
        """Raise InvalidInput if the generator is closed, or was inherited by a fork."""
        self._refuse_inherited()
        if self.closed:
            raise InvalidInput("The pipeline is closed.", expected="an open pipeline", fix="Open a new pipeline.")

    def close(self) -> None:
        """Free weights and buffers. Nothing can run afterwards. A child process frees nothing that it inherited."""
        if self.closed or self.inherited:
            return
        self.closed = True
        self._release()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._conditions.clear()
        self.backend.close()

    def graph(self, name: str) -> Graph:
        """A graph of the bundle. It is opened the first time."""
        self.require_open()
        if name not in self._graphs:
            self._graphs[name] = self.backend.open(self.bundle, name)
        return self._graphs[name]

    def opened(self, size: tuple[int, int]) -> set[str]:
        """Names of the graphs whose weights are in memory for images of (h, w) tokens."""
        return {name for name, graph in self._graphs.items() if graph.holds(size)}

    @cached_property
    def prefills(self) -> bool:
        """Whether given scales run in one pass: the bundle has the graph, and the backend can open it."""
        return PREFILL in self.bundle.manifest.graphs and self.backend.prepared(self.bundle, PREFILL)

    def prefill_graph(self, request: Request) -> Graph | None:
        """The graph that runs given scales in one pass; None if they run one by one."""
        if not self.prefills or not (PREFILL in self._graphs or self._has_room_for_prefill(request)):
            return None
        return self.graph(PREFILL)

    def _has_room_for_prefill(self, request: Request) -> bool:
        """Whether a second copy of the weights of the step graph fits in memory. Only a host asks."""
        return True

    def condition(self, labels: Sequence[int]) -> dict[str, Float32]:
        """Every output of the condition graph by name, with one row for each label, on the host."""
        self.require_open()
        return {name: self.backend.download(array) for name, array in self._conditions.rows(labels).items()}

    def decode(self, tokens_Bhw: Tokens) -> Iterator[Float32]:
        """Tokens to decoded images (b, 3, H, W), not clamped, in as many runs as memory needs.

        Each array holds until the next one is asked for.
        """
        B, h, w = tokens_Bhw.shape
        factor = self.model.downsampling
        batch = min(B, self._most_images(DECODE, (h, w)))
        image = self.backend.empty((batch, 3, h * factor, w * factor), "float32")
        for start in range(0, B, batch):
            part = tokens_Bhw[start : start + batch]
            view = image[: len(part)]
            self._run_graph(DECODE, {"tokens": self.backend.upload(part)}, {"image": view})
            yield self.backend.download(view)

    def images(self, tokens_Bhw: Tokens, keep_decoded: bool = False) -> tuple[Pixels, Float32 | None]:
        """Tokens to pixels (B, H, W, 3), and the decoded images (B, 3, H, W) if they are to be kept.

        Raises ArtifactRefused if the decoder gives NaN or infinity.
        """
        pixels, kept = [], []
        for decoded in self.decode(tokens_Bhw):
            require_finite(decoded)
            pixels.append(to_uint8(decoded, self.model.value_range))
            if keep_decoded:
                kept.append(decoded.copy())
        return np.concatenate(pixels), np.concatenate(kept) if keep_decoded else None

    def encode(self, image_BCHW: Float32) -> Float32:
        """Images (B, 3, H, W) to continuous latents (B, D, h, w), in as many runs as memory needs."""
        B, _, H, W = image_BCHW.shape
        h, w = H // self.model.downsampling, W // self.model.downsampling
        batch = min(B, self._most_images(ENCODE, (h, w)))
        latents = []
        for start in range(0, B, batch):
            part = image_BCHW[start : start + batch]
            latent = self.backend.empty((len(part), self.model.code_dim, h, w), "float32")
            self._run_graph(ENCODE, {"image": self.backend.upload(part)}, {"latent": latent})
            latents.append(self.backend.download(latent))
        return np.concatenate(latents)

    def _run_graph(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        graph = self.graph(name)
        self.attempt(lambda: graph.run(inputs, outputs))
