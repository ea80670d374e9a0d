"""A backend that records what the runtime asks of it: which memory is bound, opened, kept and freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.backends.base import Bound
from flexvar_runtime.backends.ort.memory import ORT
from flexvar_runtime.memory.library import LibraryMemory
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import GRAPHS, new_names, past_names
from flexvar_runtime.model.tensors import GraphSpec, host_dtype

Array = NDArray[Any]
DEPTH, VOCABULARY, CLASSES, NULL = 3, 16, 100, 100
SCHEDULE = "1_2_2x3_3_4x5"
MODEL = ModelFacts(
    depth=DEPTH,
    width=8,
    heads=2,
    head_size=4,
    classes=CLASSES,
    class_names=None,
    null_class=NULL,
    vocabulary=VOCABULARY,
    code_dim=3,
    downsampling=2,
    value_range=(-1.0, 1.0),
    position_side=4,
)


@dataclass(frozen=True)
class Run:
    """One run of a graph: the very arrays that were bound, and the values of the inputs at that time."""

    graph: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    values: dict[str, Array]


@dataclass
class RecordingGraph:
    backend: RecordingBackend
    name: str
    spec: GraphSpec
    once: bool
    closed: bool = False

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        raise AssertionError("a generator on the host runs graphs and binds none")

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        assert not self.closed
        self._check(inputs, outputs)
        if self.backend.recording:
            values = {name: array.copy() for name, array in inputs.items()}
            self.backend.runs.append(Run(self.name, dict(inputs), dict(outputs), values))
        number = len(self.backend.runs)
        for i, (name, array) in enumerate(outputs.items()):
            if name == "logits":
                array[:] = np.random.default_rng(number).standard_normal(array.shape, np.float32)
            elif name == "image":  # its tokens, so that order and batch can be seen
                array[:] = inputs["tokens"][:, :1, :1][:, None] / VOCABULARY
            elif name == "latent":
                array[:] = inputs["image"][:, :1, :1, :1]
            elif self.name == "condition":
                array[:] = inputs["labels"].reshape(-1, *[1] * (array.ndim - 1)) + i / 10
            else:
                array[:] = 1000 * number + i

    def _check(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Names, types and shapes are those of the declaration, and a named axis has one size."""
        sizes: dict[str, int] = {}
        for tensors, arrays in ((self.spec.inputs, inputs), (self.spec.outputs, outputs)):
            assert {tensor.name for tensor in tensors} == set(arrays)
            for tensor in tensors:
                array = arrays[tensor.name]
                assert array.dtype == host_dtype(tensor.dtype) and array.ndim == len(tensor.axes)
                assert array.flags.c_contiguous
                for axis, size in zip(tensor.axes, array.shape, strict=True):
                    base, _, factor = str(axis).partition("_x")
                    expected = axis if isinstance(axis, int) else sizes.setdefault(base, size // int(factor or 1))
                    assert size == expected * int(factor or 1) if isinstance(axis, str) else size == axis

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@dataclass
class RecordingBackend:
    """NumPy in place of a device: nothing is computed, everything is noted (runs only while `recording`)."""

    name: str = "recording"
    precisions: frozenset[str] = frozenset({"fp32"})
    threads: int = 1
    labels_per_run: int = 2
    maps_weights: bool = True
    device: None = None
    available: int | None = None
    recording: bool = True
    graphs: list[RecordingGraph] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> RecordingGraph:
        assert bundle.graph_file(graph).is_file()
        self.graphs.append(RecordingGraph(self, graph, bundle.graph(graph), once))
        return self.graphs[-1]

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def libraries(self, precision: str) -> dict[str, LibraryMemory]:
        return dict.fromkeys(GRAPHS, ORT)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        self.arrays.append(np.empty(shape, host_dtype(dtype)))
        return self.arrays[-1]

    def upload(self, host: Array) -> Array:
        return np.ascontiguousarray(host)

    def download(self, array: Array) -> Array:
        return array

    def available_bytes(self) -> int | None:
        return self.available

    def close(self) -> None:
        self.arrays.clear()

    def runs_of(self, graph: str) -> list[Run]:
        return [run for run in self.runs if run.graph == graph]

    def opened(self, graph: str) -> list[RecordingGraph]:
        return [opened for opened in self.graphs if opened.name == graph]


Open = Callable[..., tuple[FlexVARPipeline, RecordingBackend]]


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def check_past(steps: list[Run]) -> None:
    """The past of every step of one generation is what the steps before it wrote, block by block."""
    for past, new in zip(past_names(DEPTH), new_names(DEPTH), strict=True):
        written: list[Array] = []
        for run in steps:
            if written:
                np.testing.assert_array_equal(run.values[past], np.concatenate(written))
            written.append(run.outputs[new].copy())
        assert len({float(array.flat[0]) for array in written}) == len(steps)  # every scale wrote its own
