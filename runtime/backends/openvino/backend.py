"""OpenVINO on the CPU, for bundles in float32, float16 and bfloat16.

OpenVINO shares the memory of our arrays: it reads inputs and writes outputs in place. The precision hint is float32.
OpenVINO then computes bfloat16 products in bfloat16 if the processor can, and all other half precision in float32. It
never rounds a tensor that the graph declares float32.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...bundle.opening import Bundle
from ...checks import version_numbers
from ...errors import BackendUnavailable, first_line
from ...machine.forks import never_free_in_children
from ...machine.processors import default_threads
from ...machine.threads import require_threads
from ...memory.library import LibraryMemory
from ...model.precision import TOKENIZER_GRAPHS, Precision
from ...model.signatures import DECODE, GRAPHS
from ...model.tensors import GraphSpec, TensorSpec, host_dtype
from ..base import Arrays, Availability, Graph, check_bindings, closed_graph, runs_precision
from ..failures import failure
from ..host_arrays import HostBackend, check_options, require_contiguous
from ..loading import load_openvino
from .memory import library_of
from .norms import keep_layout

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""The shape of each tensor, by name."""

PRECISIONS = frozenset({Precision.FP32, Precision.FP16, Precision.BF16})  # it computes int8 in float32, which is slower
MINIMUM = "2026.4"  # the version that was tested; it reads ONNX's Attention
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
KERNELS_KEPT = 256
"""The most kernels that a graph keeps, those used last. OpenVINO's default is 5,000, and it makes some for every new
shape, so memory would grow to gigabytes. The step uses up to 100 in a generation of 13 scales."""
TOKENIZER_KERNELS_KEPT = 10
"""Like KERNELS_KEPT, for the graphs of the tokenizer. Theirs are larger, and they are as fast with so few."""
_CAPABILITIES = "OPTIMIZATION_CAPABILITIES"
_CORE_LOCK = threading.Lock()


def shared_core() -> Any:
    """The only `openvino.Core` of this process. It is never freed.

    A core replaces its thread's stack for signal handlers, and restores the old stack when it is freed. If two cores
    are freed in the order in which they were made, the second restores a stack that is freed already. The next signal
    with a handler, such as an interrupt, then kills the process (OpenVINO 2026.4, Linux).
    """
    with _CORE_LOCK:  # without the lock two threads could make one core each
        return _core()


@cache
def _core() -> Any:
    core = load_openvino().Core()
    never_free_in_children(core)
    return core


@cache
def _first_process() -> int:
    """The process that used OpenVINO first."""
    return os.getpid()


def _refuse_forked() -> None:
    """Raise BackendUnavailable in a child of a process that has used OpenVINO, where it would wait for ever.

    OpenVINO's threads are shared by all models and stay in the parent.
    """
    if _first_process() != os.getpid():
        raise BackendUnavailable(
            "OpenVINO was used before a fork, and cannot be used in the child process.",
            expected="a process in which OpenVINO was not used before a fork",
            fix="Open pipelines only in the child processes, or start these with spawn instead of fork.",
        )


def probe(name: str) -> Availability:
    try:
        openvino = load_openvino()
        version = str(openvino.__version__).partition("-")[0]
        old = version_numbers(version) < version_numbers(MINIMUM)
        kinds = set() if old else set(shared_core().get_property("CPU", _CAPABILITIES))
    except ModuleNotFoundError:
        return Availability(False, "openvino is not installed", "pip install 'flexvar-deploy[openvino]'")
    except Exception as error:  # a damaged wheel can raise any error
        fix = "pip install --force-reinstall openvino"
        return Availability(False, f"openvino cannot be loaded ({first_line(error)})", fix)
    if old:
        return Availability(False, f"openvino {version} is older than {MINIMUM}", f"pip install 'openvino>={MINIMUM}'")
    arithmetic = "bf16 arithmetic" if "BF16" in kinds else "no bf16 arithmetic"
    return Availability(True, f"openvino {version}, {default_threads()} threads, {arithmetic}")


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    return runs_precision(name, bundle.manifest.precision, PRECISIONS)


def libraries(precision: Precision) -> dict[str, LibraryMemory]:
    return {graph: library_of(precision.of(graph), has_bf16_arithmetic()) for graph in GRAPHS}


def has_bf16_arithmetic() -> bool:
    """Whether this processor computes in bfloat16; False where OpenVINO cannot be loaded."""
    try:
        return "BF16" in shared_core().get_property("CPU", _CAPABILITIES)
    except Exception:
        return False


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None = None) -> OpenVino:
    return OpenVino(check_options(name, device, threads, engines))


class OpenVino(HostBackend):
    """The backend openvino on `threads` threads."""

    name = "openvino"
    precisions = PRECISIONS

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        _refuse_forked()
        self._core = shared_core()

    def libraries(self, precision: Precision) -> dict[str, LibraryMemory]:
        return libraries(precision)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """Compile a graph; `once` changes nothing. The decoder in bfloat16 is compiled when it is first run."""
        manifest = bundle.manifest
        if graph == DECODE and manifest.precision.of(graph) is Precision.BF16:
            size = manifest.defaults.size
            return DefaultSizeGraph(bundle.graph(graph), size, lambda shapes: self._compile(bundle, graph, shapes))
        return self._compile(bundle, graph)

    def _compile(self, bundle: Bundle, graph: str, shapes: Shapes | None = None) -> OpenVinoGraph:
        """shapes: the only shapes of the inputs; None compiles for all shapes."""
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # without it OpenVINO rounds float32 tensors to bfloat16
            "CPU_RUNTIME_CACHE_CAPACITY": TOKENIZER_KERNELS_KEPT if graph in TOKENIZER_GRAPHS else KERNELS_KEPT,
        }
        path = bundle.graph_file(graph)
        require_threads(self.threads + 1)  # it starts a thread that runs the graph with the others
        with bundle.unchanged(), _errors(path.name):
            source = self._core.read_model(str(path))
            if shapes is not None:
                source.reshape({name: list(shape) for name, shape in shapes.items()})
                keep_layout(source)
            model = self._core.compile_model(source, "CPU", settings)
        return OpenVinoGraph(model, path.name, bundle.graph(graph))


class OpenVinoGraph(Graph):
    """A compiled model. If it takes all shapes, OpenVINO prepares kernels at the first run of each shape."""

    def __init__(self, model: Any, name: str, spec: GraphSpec) -> None:
        self.spec, self.name = spec, name
        self._model = model
        self._library: Any = load_openvino()
        tensors = (*spec.inputs, *spec.outputs)
        self._types = {tensor.name: getattr(self._library.Type, _TYPES[tensor.dtype]) for tensor in tensors}
        if any("past" in tensor.axes for tensor in spec.inputs):
            self._warm_up_with_past()

    def bind(self, inputs: Arrays, outputs: Arrays) -> OpenVinoBound:
        if self._model is None:
            raise closed_graph(self.name)
        check_bindings(self.spec, inputs, outputs)
        with _errors(self.name):
            request = self._model.create_infer_request()  # 0.05 ms; an old request would keep its tensors
            for name, array in (*inputs.items(), *outputs.items()):
                shape = self._library.Shape(list(array.shape))
                request.set_tensor(name, self._library.Tensor(require_contiguous(array), shape, self._types[name]))
        return OpenVinoBound(self, request, (inputs, outputs))

    def close(self) -> None:
        self._model = None

    def _warm_up_with_past(self) -> None:
        """Run once with one past token.

        If the very first run of a dynamic model has no past tokens, later runs compute garbage (OpenVINO 2026.4).
        """

        def zeros(tensor: TensorSpec) -> NDArray[Any]:
            return np.zeros([axis if isinstance(axis, int) else 1 for axis in tensor.axes], host_dtype(tensor.dtype))

        self.run({t.name: zeros(t) for t in self.spec.inputs}, {t.name: zeros(t) for t in self.spec.outputs})


class OpenVinoBound:
    """An inference request with its tensors. It keeps the arrays, because the tensors only point into them."""

    def __init__(self, graph: OpenVinoGraph, request: Any, arrays: object) -> None:
        self._graph, self._request, self._arrays = graph, request, arrays

    def run(self) -> None:
        with _errors(self._graph.name):
            self._request.infer()

    def close(self) -> None:
        self._request = self._arrays = None


class DefaultSizeGraph(Graph):
    """The decoder in bfloat16 as two models: one for a single image of the default size, and one for all other sizes.

    A model for one shape is an eighth faster. A model for every size would cost a second of compilation and a copy of
    the weights each. Each model is compiled at its first use. The size of the images alone decides which one runs.
    """

    def __init__(
        self, spec: GraphSpec, default: tuple[int, int], compiled: Callable[[Shapes | None], OpenVinoGraph]
    ) -> None:
        """default: size in tokens (h, w). compiled: returns the model for these shapes of the inputs, or for all."""
        self.spec, self._default, self._compiled = spec, default, compiled
        self._graphs: dict[bool, OpenVinoGraph] = {}  # True: the model for the default size
        self._open = True

    def holds(self, size: tuple[int, int]) -> bool:
        return (size == self._default) in self._graphs

    def bind(self, inputs: Arrays, outputs: Arrays) -> OpenVinoBound | OneByOne:
        if not self._open:
            raise closed_graph(self.spec.file)
        check_bindings(self.spec, inputs, outputs)
        images, *size = inputs["tokens"].shape
        default = tuple(size) == self._default
        graph = self._graph(default)
        if not default:
            return graph.bind(inputs, outputs)
        return OneByOne([graph.bind(_image(inputs, i), _image(outputs, i)) for i in range(images)])

    def close(self) -> None:
        self._open = False
        for graph in self._graphs.values():
            graph.close()

    def _graph(self, default: bool) -> OpenVinoGraph:
        if default not in self._graphs:
            sizes = {"images": 1, "height": self._default[0], "width": self._default[1]}
            shapes = {tensor.name: tensor.shape(sizes) for tensor in self.spec.inputs}
            self._graphs[default] = self._compiled(shapes if default else None)
        return self._graphs[default]


def _image(arrays: Arrays, i: int) -> Arrays:
    """Image i of a batch, as a batch of one."""
    return {name: array[i : i + 1] for name, array in arrays.items()}


class OneByOne:
    """The images of a batch, bound one by one and run one after another."""

    def __init__(self, images: Sequence[OpenVinoBound]) -> None:
        self._images = images

    def run(self) -> None:
        for image in self._images:
            image.run()

    def close(self) -> None:
        for image in self._images:
            image.close()


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Raise OpenVINO's RuntimeError as an error of this package. name: of the graph."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise failure("OpenVINO", name, error, (lines or [type(error).__name__])[-1][:300]) from error
