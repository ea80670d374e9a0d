"""The graphs of a bundle in use: condition, scale loop, decoder and encoder, in terms of arrays.

No requests, no sampling, no pixels: those are the pipeline's. What is proved against the reference is this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, Graph
from .bundle import Bundle
from .errors import ArtifactRefused, BackendUnavailable, InvalidInput
from .graphs import CONDITION, DECODE, ENCODE, STEP, TABLES_FILE, graph_specs
from .guidance import Guidance
from .loop import Condition, LoopBuffers, ScaleLoop
from .memory import decode_bytes, require
from .schedule import ScaleSchedule
from .tables import Tables

Float32 = NDArray[np.float32]
CONDITIONS_KEPT = 32  # classes whose condition is remembered (0.4 MB each for d16)
LABELS_PER_RUN = 2  # of the condition graph, always: a label's row must not depend on its neighbours
IMAGES_PER_RUN = 8  # of decoder and encoder, at the most


class Engine:
    """A bundle's graphs, opened when first used, on one backend."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        precision = bundle.manifest.precision
        if precision not in backend.precisions:
            raise BackendUnavailable(
                f"a {precision} bundle on {backend.name}",
                expected=f"one of {', '.join(sorted(backend.precisions))}",
                fix="export with --precision fp32, or name a backend that runs it (flexvar doctor)",
            )
        self.bundle, self.backend, self.model = bundle, backend, bundle.manifest.model
        for name, spec in graph_specs(self.model, precision).items():
            if bundle.graph(name) != spec:
                raise ArtifactRefused(
                    f"graph {name} with other tensors than a {precision} model of its size has",
                    expected="the inputs and outputs this version knows",
                    fix="export again with this version",
                )
        self.tables = Tables.load(bundle.file(TABLES_FILE), self.model)
        self._graphs: dict[str, Graph] = {}
        self._conditions: OrderedDict[int, Condition] = OrderedDict()
        self._spare: LoopBuffers | None = None
        self._closed = False

    def close(self) -> None:
        """Free weights and buffers; nothing can be run afterwards."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._conditions.clear()
        self._spare, self._closed = None, True

    def condition(self, labels: Sequence[int]) -> Condition:
        """One row a label. The graph is opened for the classes not remembered, then its weights are freed."""
        distinct = list(dict.fromkeys(labels))
        known = {label: self._conditions[label] for label in distinct if label in self._conditions}
        missing = [label for label in distinct if label not in known]
        if missing:
            self._require_open()
            spec = self.bundle.graph(CONDITION)
            graph = self.backend.open(self.bundle.graph_file(CONDITION), spec, once=True)
            try:
                for start in range(0, len(missing), LABELS_PER_RUN):
                    pair = missing[start : start + LABELS_PER_RUN]
                    known |= zip(pair, self._run_condition(graph, pair), strict=False)
            finally:
                graph.close()
        for label in distinct:
            self._conditions[label] = known[label]
            self._conditions.move_to_end(label)
        while len(self._conditions) > CONDITIONS_KEPT:
            self._conditions.popitem(last=False)
        return Condition.stack([known[label] for label in labels])

    def _run_condition(self, graph: Graph, labels: list[int]) -> list[Condition]:
        padded = np.full(LABELS_PER_RUN, self.model.null_class, np.int32)
        padded[: len(labels)] = labels
        outputs = {
            tensor.name: self.backend.empty(
                (LABELS_PER_RUN, *(a for a in tensor.axes if isinstance(a, int))), "float32"
            )
            for tensor in graph.spec.outputs
        }
        graph.run({"labels": self.backend.upload(padded)}, outputs)
        host = {name: self.backend.download(array) for name, array in outputs.items()}
        return [
            Condition(**{name: array[i : i + 1].copy() for name, array in host.items()}) for i in range(LABELS_PER_RUN)
        ]

    @contextmanager
    def loop(self, labels: Sequence[int], schedule: ScaleSchedule, guidance: Guidance) -> Iterator[ScaleLoop]:
        """A loop over `schedule`, one image a label; a second, unconditional branch only where guidance acts.

        Its buffers go to the next loop of the same shape; two loops open at once never share them.
        """
        weights = guidance.weights(schedule)
        guided = any(t != 0 for t in weights)
        condition = self.condition([*labels] + [self.model.null_class] * (len(labels) if guided else 0))
        step = self._graph(STEP)
        buffers, self._spare = self._spare, None
        if buffers is None or (buffers.schedule, buffers.images, buffers.guided) != (schedule, len(labels), guided):
            buffers = None  # freed before the new ones are taken
            buffers = LoopBuffers.allocate(
                self.backend, step.spec, self.model, self.tables, schedule, len(labels), guided
            )
        try:
            yield ScaleLoop(self.backend, step, self.tables, self.model, buffers, condition, weights)
        finally:
            self._spare = None if self._closed else buffers

    def decode(self, tokens_Bhw: NDArray[np.int32]) -> Iterator[Float32]:
        """Tokens to decoded images (b, 3, H, W), not clamped, in micro-batches that fit memory.

        A micro-batch holds until the next one is asked for.
        """
        B, h, w = tokens_Bhw.shape
        factor = self.model.downsampling
        batch = min(B, self._batch_that_fits((h, w), "decoding an image"))
        image = self.backend.empty((batch, 3, h * factor, w * factor), "float32")
        for start in range(0, B, batch):
            part = tokens_Bhw[start : start + batch]
            view = image[: len(part)]
            self._graph(DECODE).run({"tokens": self.backend.upload(part)}, {"image": view})
            yield self.backend.download(view)

    def encode(self, image_BCHW: Float32) -> Float32:
        """Images (B, 3, H, W) to continuous latents (B, D, h, w), in micro-batches that fit memory."""
        B, _, H, W = image_BCHW.shape
        h, w = H // self.model.downsampling, W // self.model.downsampling
        batch = min(B, self._batch_that_fits((h, w), "encoding an image"))
        latent = self.backend.empty((B, self.model.code_dim, h, w), "float32")
        for start in range(0, B, batch):
            part = self.backend.upload(image_BCHW[start : start + batch])
            self._graph(ENCODE).run({"image": part}, {"latent": latent[start : start + batch]})
        return self.backend.download(latent)

    def _batch_that_fits(self, size: tuple[int, int], what: str) -> int:
        one, available = decode_bytes(self.model, size), self.backend.available_bytes()
        require(one, available, f"{what} of {size[0]}x{size[1]} tokens", "use a smaller size")
        fits = IMAGES_PER_RUN if available is None else available // (2 * one)  # half of what is left, at the most
        return max(1, min(IMAGES_PER_RUN, fits))

    def _graph(self, name: str) -> Graph:
        self._require_open()
        if name not in self._graphs:
            spec = self.bundle.graph(name)
            self._graphs[name] = self.backend.open(self.bundle.graph_file(name), spec)
        return self._graphs[name]

    def _require_open(self) -> None:
        if self._closed:
            raise InvalidInput("a closed pipeline", expected="an open one", fix="open the bundle again")
