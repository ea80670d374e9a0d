"""The graphs of a bundle in use: condition, scale loop, decoder and encoder, in terms of arrays.

No requests, no sampling, no pixels: those are the pipeline's. What is proved against the reference is this.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .backends import way_out
from .backends.base import Backend, Graph
from .bundle import Bundle
from .conditions import Condition, row_groups
from .errors import ArtifactRefused, BackendUnavailable, InvalidInput
from .graphs import CONDITION, DECODE, ENCODE, PREFILL, REQUIRED, STEP, TABLES_FILE, graph_specs
from .guidance import Guidance
from .loop import Draws, Loop, LoopBuffers, ScaleLoop
from .manifest import SCHEMA_VERSION
from .planner import IMAGES_PER_RUN, MemoryPlan, batch_that_fits, plan, require_fits
from .schedule import ScaleSchedule
from .tables import Tables

if TYPE_CHECKING:
    from .cuda.generator import DeviceGenerator, Replayed

log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]
CONDITIONS_KEPT = 32  # classes whose condition is remembered (0.4 MB each for d16)


def require_precision(bundle: Bundle, backend: Backend) -> None:
    """Raise BackendUnavailable where a backend does not run what a bundle computes in."""
    precision = bundle.manifest.precision
    if precision not in backend.precisions:
        raise BackendUnavailable(
            f"a bundle of precision {precision} on {backend.name}",
            expected=f"one of {', '.join(sorted(backend.precisions))}",
            fix=way_out(precision),
        )


class Engine:
    """A bundle's graphs, opened when first used, on one backend."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        require_precision(bundle, backend)
        precision = bundle.manifest.precision
        self.bundle, self.backend, self.model = bundle, backend, bundle.manifest.model
        version = bundle.manifest.schema_version
        for name, spec in graph_specs(self.model, precision, version).items():
            if name not in REQUIRED and name not in bundle.manifest.graphs:
                continue
            if bundle.graph(name) != spec:
                raise ArtifactRefused(
                    f"graph {name} with other tensors than a {precision} model of its size has",
                    expected="the inputs and outputs this version knows",
                    fix="export again with this version",
                )
        if version < SCHEMA_VERSION:
            log.warning(
                "this bundle has schema version %d, and this version exports %d; ort-cuda refuses it, and on other "
                "backends a new export with flexvar export is faster",
                version,
                SCHEMA_VERSION,
            )
        self.tables = Tables.load(bundle.file(TABLES_FILE), self.model)
        self._graphs: dict[str, Graph] = {}
        self._conditions: OrderedDict[int, Condition] = OrderedDict()
        self._spare: LoopBuffers | None = None
        self._closed = False
        self._generator = self._start_generator()

    def _start_generator(self) -> DeviceGenerator | None:
        device = self.backend.device
        if device is None:
            return None
        from .cuda.generator import DeviceGenerator  # only where there is a device

        return DeviceGenerator(
            self.backend,
            device,
            self.model,
            self.bundle.manifest.precision,
            self.tables,
            self.bundle.graph(CONDITION),
            self.graph,
            self._open_prefill,
        )

    def close(self) -> None:
        """Free weights and buffers; nothing can be run afterwards."""
        if self._closed:
            return
        if self._generator is not None:
            self._generator.close()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._conditions.clear()
        self._spare, self._generator, self._closed = None, None, True
        self.backend.close()

    def condition(self, labels: Sequence[int]) -> Condition:
        """One row a label. Where weights are mapped the graph is opened for the classes not remembered, then closed."""
        distinct = list(dict.fromkeys(labels))
        known = {label: self._conditions[label] for label in distinct if label in self._conditions}
        missing = [label for label in distinct if label not in known]
        if missing:
            self._require_open()
            with self._condition_graph() as graph:
                per_run = self.backend.labels_per_run
                for start in range(0, len(missing), per_run):
                    some = missing[start : start + per_run]
                    known |= zip(some, self._run_condition(graph, some), strict=False)
        for label in distinct:
            self._conditions[label] = known[label]
            self._conditions.move_to_end(label)
        while len(self._conditions) > CONDITIONS_KEPT:
            self._conditions.popitem(last=False)
        return Condition.stack([known[label] for label in labels])

    @contextmanager
    def _condition_graph(self) -> Iterator[Graph]:
        if not self.backend.maps_weights:
            yield self.graph(CONDITION)
            return
        graph = self.backend.open(self.bundle, CONDITION, once=True)
        try:
            yield graph
        finally:
            graph.close()

    def _run_condition(self, graph: Graph, labels: list[int]) -> list[Condition]:
        rows, backend = self.backend.labels_per_run, self.backend
        padded = np.full(rows, self.model.null_class, np.int32)
        padded[: len(labels)] = labels
        found = Condition.compute(
            row_groups(graph.spec),
            rows,
            backend.empty,
            lambda outputs: graph.run({"labels": backend.upload(padded)}, outputs),
            backend.download,
        )
        return [found.row(i) for i in range(rows)]

    @contextmanager
    def loop(self, labels: Sequence[int], schedule: ScaleSchedule, guidance: Guidance) -> Iterator[Loop]:
        """A loop over `schedule`, one image a label; a second, unconditional branch only where guidance acts.

        Its buffers go to the next loop of the same shape; two loops open at once never share them.
        """
        self._require_open()
        if self._generator is not None:
            with self._generator.loop(labels, schedule, guidance) as loop:
                yield loop
            return
        weights = guidance.weights(schedule)
        guided = any(t != 0 for t in weights)
        buffers, self._spare = self._spare, None
        if buffers is None or (buffers.schedule, buffers.images, buffers.guided) != (schedule, len(labels), guided):
            buffers = None  # freed before it is asked what is left
            self._require_fits(schedule, len(labels), guided)
        condition = self.condition([*labels] + [self.model.null_class] * (len(labels) if guided else 0))
        step = self.graph(STEP)
        if buffers is None:
            buffers = LoopBuffers.allocate(
                self.backend, step.spec, self.model, self.tables, schedule, len(labels), guided
            )
        try:
            yield ScaleLoop(
                self.backend,
                step,
                self.tables,
                self.model,
                buffers,
                condition,
                weights,
                lambda: self._open_prefill(self._plan(schedule, len(labels), guided)),
            )
        finally:
            self._spare = None if self._closed else buffers

    def replay(
        self,
        labels: Sequence[int],
        schedule: ScaleSchedule,
        guidance: Guidance,
        draws: Draws,
        keep_decoded: bool = False,
    ) -> Replayed | None:
        """A whole generation without waiting in between; None where the backend has no device to do that on."""
        self._require_open()
        if self._generator is None:
            return None
        return self._generator.replay(labels, schedule, guidance, draws, keep_decoded)

    def decode(self, tokens_Bhw: NDArray[np.int32]) -> Iterator[Float32]:
        """Tokens to decoded images (b, 3, H, W), not clamped, in micro-batches that fit memory.

        A micro-batch holds until the next one is asked for.
        """
        B, h, w = tokens_Bhw.shape
        factor = self.model.downsampling
        batch = min(B, self._batch_that_fits(DECODE, (h, w)))
        image = self.backend.empty((batch, 3, h * factor, w * factor), "float32")
        for start in range(0, B, batch):
            part = tokens_Bhw[start : start + batch]
            view = image[: len(part)]
            self._run(DECODE, {"tokens": self.backend.upload(part)}, {"image": view})
            yield self.backend.download(view)

    def encode(self, image_BCHW: Float32) -> Float32:
        """Images (B, 3, H, W) to continuous latents (B, D, h, w), in micro-batches that fit memory."""
        B, _, H, W = image_BCHW.shape
        h, w = H // self.model.downsampling, W // self.model.downsampling
        batch = min(B, self._batch_that_fits(ENCODE, (h, w)))
        latents = []
        for start in range(0, B, batch):
            part = image_BCHW[start : start + batch]
            latent = self.backend.empty((len(part), self.model.code_dim, h, w), "float32")
            self._run(ENCODE, {"image": self.backend.upload(part)}, {"latent": latent})
            latents.append(self.backend.download(latent))
        return np.concatenate(latents)

    def _run(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Run a graph once; on a device once more if memory runs out, after unused buffers are freed."""
        run = partial(self.graph(name).run, inputs, outputs)
        if self._generator is None:
            run()
        else:
            self._generator.retry_after_freeing(run)

    def _require_fits(self, schedule: ScaleSchedule, images: int, guided: bool) -> None:
        """Refuse, before anything is opened, what would not fit with the decoder running one image at a time."""
        self._require_open()
        require_fits(
            lambda batch: self._plan(schedule, batch, guided),
            images,
            self.backend.available_bytes(),
            self._held(schedule[-1]),
        )

    def _plan(self, schedule: ScaleSchedule, images: int, guided: bool) -> MemoryPlan:
        return plan(
            self.bundle.manifest,
            schedule,
            images,
            guided,
            decoded_at_once=1,
            backend=self.backend.name,
            bf16_arithmetic=self.backend.bf16_arithmetic,
        )

    def _batch_that_fits(self, graph: str, size: tuple[int, int]) -> int:
        if self.backend.device is not None:
            return min(IMAGES_PER_RUN, self.graph(graph).most_images or IMAGES_PER_RUN)
        manifest, available = self.bundle.manifest, self.backend.available_bytes()
        return batch_that_fits(
            manifest, graph, size, available, self._held(size), self.backend.name, self.backend.bf16_arithmetic
        )

    def _held(self, size: tuple[int, int]) -> set[str]:
        """Graphs whose weights are in memory already, for images of (h, w) tokens."""
        return {name for name, graph in self._graphs.items() if graph.holds(size)}

    def graph(self, name: str) -> Graph:
        """A graph of the bundle, opened when first asked for."""
        self._require_open()
        if name not in self._graphs:
            self._graphs[name] = self.backend.open(self.bundle, name)
        return self._graphs[name]

    @cached_property
    def prefills(self) -> bool:
        """Whether given scales run in one pass: the bundle has the graph and the backend can open it."""
        return PREFILL in self.bundle.manifest.graphs and self.backend.prepared(self.bundle, PREFILL)

    def _open_prefill(self, wanted: MemoryPlan | None = None) -> Graph | None:
        """The graph for given scales; None where they run one by one. wanted: what the request takes, on the host.

        Its weights are a second copy of those of `step`: it is opened where that leaves room for what is still wanted.
        """
        if not self.prefills:
            return None
        if wanted is not None and PREFILL not in self._graphs:
            available, held = self.backend.available_bytes(), self._held(wanted.schedule[-1])
            if available is not None and wanted.needed(held) + wanted.weights[STEP] > available:
                log.info("given scales run one by one: no room for the weights of %s", PREFILL)
                return None
        return self.graph(PREFILL)

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidInput("a closed pipeline", expected="an open one", fix="open the bundle again")
