"""OpenVINO on the CPU: float32, both half precisions, and bfloat16 arithmetic where the processor has it.

Arrays are shared with the library: inputs are read and outputs written in place. Asked for float32, the library leaves
bfloat16 products of a graph as they are where the processor has them, and computes all other half precision in float32:
what a graph declares float32 is never rounded.
"""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...bundle.opening import Bundle
from ...errors import ArtifactRefused, InvalidInput, OutOfMemory
from ...memory.library import LibraryMemory
from ...model.precision import Precision
from ...model.signatures import DECODE, GRAPHS
from ...model.tensors import GraphSpec, host_dtype
from ..base import Array, Availability, Graph, check_bindings, runs_precision
from ..host_arrays import HostBackend, check_options, default_threads, require_contiguous
from .memory import library_of
from .norms import keep_layout

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes by name of a tensor."""

PRECISIONS = frozenset({Precision.FP32, Precision.FP16, Precision.BF16})  # it would compute int8 in float32, slower
MINIMUM = (2026, 4)  # what was tested: it reads the Attention of ONNX
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
_CAPABILITIES = "OPTIMIZATION_CAPABILITIES"
_CORE_LOCK = threading.Lock()
_NO_MEMORY = ("bad_alloc", "allocate", "out of memory")


def shared_core() -> Any:
    """The one core of this process, never given back.

    Every core replaces its thread's stack for signal handlers and, when it goes, restores the one it had found. Of two
    that go in the order they came, the second restores one that is freed: the next signal with a handler, such as an
    interrupt, ends the process (OpenVINO 2026.4, Linux).
    """
    with _CORE_LOCK:  # the cache alone would let two threads make one each
        return _core()


@cache
def _core() -> Any:
    return importlib.import_module("openvino").Core()


def probe(name: str) -> Availability:
    try:
        openvino = importlib.import_module("openvino")
        version = str(openvino.__version__).partition("-")[0]
        number = tuple(int(part) for part in re.findall("[0-9]+", version)[:2])
        kinds = set(shared_core().get_property("CPU", _CAPABILITIES)) if number >= MINIMUM else set()
    except ModuleNotFoundError:
        return Availability(False, "openvino is not installed", "pip install 'flexvar-deploy[openvino]'")
    except Exception as error:  # a wheel half removed or made for another system fails in any way
        first = (str(error) or type(error).__name__).splitlines()[0]
        fix = "pip install --force-reinstall openvino"
        return Availability(False, f"openvino cannot be loaded ({first})", fix)
    if number < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        return Availability(False, f"openvino {version} is older than {wanted}", f"pip install 'openvino>={wanted}'")
    arithmetic = "bf16 arithmetic" if "BF16" in kinds else "no bf16 arithmetic here"
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
    """Backend on `threads` threads."""

    name = "openvino"
    precisions = PRECISIONS

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._core = shared_core()

    def libraries(self, precision: Precision) -> dict[str, LibraryMemory]:
        return libraries(precision)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """`once` changes nothing: a graph is always compiled, its weights always repacked; the decoder in bfloat16 when
        a call first has its size."""
        path, spec, manifest = bundle.graph_file(graph), bundle.graph(graph), bundle.manifest
        if graph == DECODE and manifest.precision.of(graph) is Precision.BF16:
            return UsualSizeGraph(spec, manifest.defaults.size, lambda shapes: self._compile(path, spec, shapes))
        return self._compile(path, spec)

    def _compile(self, path: Path, spec: GraphSpec, shapes: Shapes | None = None) -> OpenVinoGraph:
        """shapes: of the inputs, where it is to be compiled for just these."""
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # of what is typed float32; left out, it would be rounded to bfloat16
        }
        with _errors(path.name):
            source = self._core.read_model(str(path))
            if shapes is not None:
                source.reshape({name: list(shape) for name, shape in shapes.items()})
                keep_layout(source)
            model = self._core.compile_model(source, "CPU", settings)
        return OpenVinoGraph(model, path.name, spec)


class OpenVinoGraph:
    """A compiled model: where it is one for all shapes, kernels are prepared when a shape is first met, and kept."""

    most_images = None  # any number

    def __init__(self, model: Any, name: str, spec: GraphSpec) -> None:
        self.spec, self.name = spec, name
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        self._library: Any = importlib.import_module("openvino")
        if any("past" in tensor.axes for tensor in spec.inputs):
            self._warm_up_with_past()

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> OpenVinoBound:
        if self._model is None:
            raise _closed(self.name)
        check_bindings(self.spec, inputs, outputs)
        with _errors(self.name):
            request = self._model.create_infer_request()  # 0.05 ms; it forgets what an earlier one had bound
            for name, array in (*inputs.items(), *outputs.items()):
                request.set_tensor(name, self._shared(name, require_contiguous(array)))
        return OpenVinoBound(self, request, (inputs, outputs))

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.bind(inputs, outputs).run()

    def close(self) -> None:
        self._model = None

    def _shared(self, name: str, array: NDArray[Any]) -> Any:
        kind = getattr(self._library.Type, _TYPES[self._tensors[name].dtype])
        return self._library.Tensor(array, self._library.Shape(list(array.shape)), kind)

    def _warm_up_with_past(self) -> None:
        """One run with a single token in the past. A dynamic model whose very first call has none goes on to compute
        garbage (OpenVINO 2026.4); after one with a past it never does."""
        inputs, outputs = (
            {
                tensor.name: np.zeros(
                    [axis if isinstance(axis, int) else 1 for axis in tensor.axes], host_dtype(tensor.dtype)
                )
                for tensor in tensors
            }
            for tensors in (self.spec.inputs, self.spec.outputs)
        )
        self.run(inputs, outputs)


class OpenVinoBound:
    """A request with its tensors. It keeps the arrays, which they only point into."""

    def __init__(self, graph: OpenVinoGraph, request: Any, arrays: object) -> None:
        self._graph, self._request, self._arrays = graph, request, arrays

    def run(self) -> None:
        with _errors(self._graph.name):
            self._request.infer()

    def close(self) -> None:
        self._request = self._arrays = None


class UsualSizeGraph:
    """The decoder in bfloat16: a model for one image of the size that most calls have, and one for all others.

    Compiled for just its shapes it is an eighth faster; for every size to have its own would cost a second and its
    weights in memory. Each is compiled when first asked for. Which one computes a call depends on the call alone.
    """

    most_images = None  # any number

    def __init__(
        self, spec: GraphSpec, usual: tuple[int, int], compiled: Callable[[Shapes | None], OpenVinoGraph]
    ) -> None:
        """usual: (h, w) tokens. compiled: makes the model for given shapes of inputs, or for any."""
        self.spec, self._usual, self._compiled = spec, usual, compiled
        self._graphs: dict[bool, OpenVinoGraph] = {}  # by whether it is that of the usual size
        self._open = True

    def holds(self, size: tuple[int, int]) -> bool:
        return (size == self._usual) in self._graphs

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> OpenVinoBound | OneByOne:
        if not self._open:
            raise _closed(self.spec.file)
        check_bindings(self.spec, inputs, outputs)
        images, *size = inputs["tokens"].shape
        usual = tuple(size) == self._usual
        graph = self._graph(usual)
        if not usual:
            return graph.bind(inputs, outputs)
        return OneByOne([graph.bind(_image(inputs, i), _image(outputs, i)) for i in range(images)])

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.bind(inputs, outputs).run()

    def close(self) -> None:
        self._open = False
        for graph in self._graphs.values():
            graph.close()

    def _graph(self, usual: bool) -> OpenVinoGraph:
        if usual not in self._graphs:
            sizes = {"images": 1, "height": self._usual[0], "width": self._usual[1]}
            shapes = {tensor.name: tensor.shape(sizes) for tensor in self.spec.inputs}
            self._graphs[usual] = self._compiled(shapes if usual else None)
        return self._graphs[usual]


def _image(arrays: Mapping[str, Array], i: int) -> dict[str, Array]:
    """One image of a batch, as a batch."""
    return {name: array[i : i + 1] for name, array in arrays.items()}


class OneByOne:
    """The images of a batch, each with its own tensors, run one after another."""

    def __init__(self, images: Sequence[OpenVinoBound]) -> None:
        self._images = images

    def run(self) -> None:
        for image in self._images:
            image.run()

    def close(self) -> None:
        for image in self._images:
            image.close()


def _closed(name: str) -> InvalidInput:
    return InvalidInput(f"{name}, closed", expected="an open graph", fix="open the bundle again")


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """OpenVINO raises RuntimeError for everything: out of memory has a meaning of its own, the rest is the graph's."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = next((line for line in lines if not line.startswith("Exception from")), type(error).__name__)[:300]
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
            fix = "use a smaller batch or schedule"
            raise OutOfMemory(f"{name}: {said}", expected="a request that fits in memory", fix=fix) from error
        raise ArtifactRefused(
            f"{name}: {said}", expected="a graph this OpenVINO can run", fix="export the bundle again"
        ) from error
