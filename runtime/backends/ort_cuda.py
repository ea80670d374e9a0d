"""ONNX Runtime on an NVIDIA GPU, on the stream of the device and on its memory.

Asked for CUDA where it cannot have it, ONNX Runtime gives a session on the processor and a warning, and nodes that CUDA
has no kernel for run on the processor without a word: here both are refused. Its own TensorRT provider is not used: it
needs an older TensorRT.

A step has hundreds of small kernels, which take longer to launch than to run. ONNX Runtime therefore captures a CUDA
graph of its own for every binding of the step and of the decoder, and replays it.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import weakref
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..cuda.backend import DeviceArrays
from ..cuda.device import Device
from ..cuda.gpu import CudaDevice, find_gpu, probe_gpu
from ..cuda.libraries import describe_missing, load_cuda_libraries
from ..errors import BackendUnavailable, InvalidInput
from ..graphs import DECODE, STEP
from ..onnx_scan import scan
from .base import Array, Availability, runs_precision
from .ort import OrtGraph, open_session, probe_onnxruntime
from .ort_placement import RECORD, require_placed

log = logging.getLogger(__name__)

NOT_CAPTURED = -1  # what ONNX Runtime takes for a run outside any CUDA graph
UNUSED_KEPT = 256  # CUDA graphs of closed bindings, 10 to 15 of a shape, before their session is opened anew
SILENT = 4  # ONNX Runtime's level of messages that leaves nothing but crashes

PRECISIONS = DeviceArrays.precisions
PROVIDER = "CUDAExecutionProvider"
MINIMUM = "1.31.1"  # the first that says where it runs the nodes of a graph
CAPTURED = frozenset({STEP, DECODE})  # graphs that are run again and again with the same addresses
_EXTRA = "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"


def probe(name: str) -> Availability:
    state = probe_onnxruntime("gpu", MINIMUM)
    if not state.available:
        return state
    ort = importlib.import_module("onnxruntime")
    if PROVIDER not in getattr(ort, "get_available_providers", list)():
        return Availability(False, f"{state.detail} is built without CUDA", _EXTRA)
    gpu = probe_gpu()
    return Availability(gpu.available, f"{state.detail}, {gpu.detail}", gpu.fix)


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    return runs_precision(name, bundle.manifest.precision, PRECISIONS)


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> OrtCuda:
    for what, given in (("threads", threads), ("engines", engines)):
        if given is not None:
            raise InvalidInput(f"{what} {given} for {name}", expected="none", fix="leave them out")
    return OrtCuda(CudaDevice(find_gpu(device)))


class OrtCuda(DeviceArrays):
    """Backend on a device.

    A whole generation is not captured: ONNX Runtime stages small copies in pinned memory that it uses again after the
    run, so replaying a graph that somebody else captured reads what is there by then (its pull requests 32081 and
    32121). Its own CUDA graphs are safe.
    """

    captures = False

    def __init__(self, device: Device) -> None:
        super().__init__("ort-cuda", device)
        self.libraries = load_cuda_libraries()  # before `preload_dlls`, which looks beside the package
        ort = importlib.import_module("onnxruntime")
        ort.set_default_logger_severity(SILENT)  # the provider's remarks go to no session's log
        preload = getattr(ort, "preload_dlls", None)
        if preload is not None:  # CUDA's libraries from their wheels, where they are not the system's
            said = io.StringIO()
            with redirect_stdout(said):
                preload()
            log.debug("%s", said.getvalue().strip())

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        """Open a session that enqueues on the device's stream. `once` makes no difference: weights stay there."""
        path, spec = bundle.graph_file(graph), bundle.graph(graph)
        captured = graph in CAPTURED
        return (CapturingGraph if captured else OrtGraph)(
            path.name,
            spec,
            open_session=lambda: self._open_session(path, graph, captured),
            place=("cuda", self.device.ordinal),
            address=lambda array: int(array.address),
            run_options=run_options(NOT_CAPTURED),
        )

    def _open_session(self, path: Path, graph: str, captured: bool) -> Any:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = SILENT  # errors are raised, and placement is checked below
        options.add_session_config_entry(RECORD, "1")
        provider = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # the decoder takes twice as long under EXHAUSTIVE, the default
            "use_tf32": "0",
            "enable_cuda_graph": str(int(captured)),
        }
        session = open_session(path, options, (PROVIDER, provider))
        first = str(session.get_providers()[0])
        if first != PROVIDER:
            raise BackendUnavailable(
                f"ONNX Runtime that fell back to {first} for {graph}{describe_missing(self.libraries)}",
                expected=PROVIDER,
                fix="flexvar doctor; the provider needs a GPU, CUDA 13 and cuDNN 9: pip install 'flexvar-deploy[gpu]'",
            )
        require_placed(session, scan(path), graph, PROVIDER)
        return session

    def close(self) -> None:
        self.device.close()


def run_options(cuda_graph: int) -> Any:
    """Options of a run that only enqueues. cuda_graph: number of the CUDA graph that it captures or replays."""
    made = importlib.import_module("onnxruntime").RunOptions()
    made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    made.add_run_config_entry("gpu_graph_id", str(cuda_graph))
    return made


class CapturingGraph(OrtGraph):
    """A graph whose bindings ONNX Runtime captures as CUDA graphs, each at its first run.

    A CUDA graph reads and writes the addresses that it was captured with, so every binding has a number of its own and
    no number is given twice. ONNX Runtime 1.31 frees CUDA graphs only with their session: once so many belong to
    bindings that are closed, the session is opened anew, and bindings that are still in use are captured again.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._numbers = itertools.count(1)
        self._bounds: weakref.WeakSet[CapturedBound] = weakref.WeakSet()
        self._unused = 0

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> CapturedBound:
        bound = CapturedBound(self, inputs, outputs)
        self._bounds.add(bound)
        return bound

    def next_number(self) -> int:
        return next(self._numbers)

    def drop(self, bound: CapturedBound) -> None:
        """Count the CUDA graph of a binding that is closed. The device is idle."""
        self._bounds.discard(bound)
        self._unused += 1
        if self._unused >= UNUSED_KEPT:
            for other in self._bounds:
                other.detach()  # a binding keeps its session
            self.renew()
            self._unused = 0


class CapturedBound:
    """Arrays, their addresses bound to the session that the graph has, and the number of the CUDA graph captured for
    them there."""

    def __init__(self, graph: CapturingGraph, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._graph = graph
        self._arrays: tuple[Mapping[str, Array], Mapping[str, Array]] | None = (inputs, outputs)
        self._binding: Any = None
        self._options: Any = None
        self._attach()

    def _attach(self) -> None:
        if self._arrays is None:
            raise InvalidInput(f"{self._graph.name}, unbound", expected="a binding in use", fix="bind it again")
        self._binding = self._graph.binding(*self._arrays)
        self._options = run_options(self._graph.next_number())

    def detach(self) -> None:
        """Give up the session, which is about to be freed."""
        self._binding = self._options = None

    def run(self) -> None:
        if self._binding is None:
            self._attach()
        self._graph.run_binding(self._binding, self._options)

    def close(self) -> None:
        if self._arrays is not None:
            self._arrays = None
            self.detach()
            self._graph.drop(self)
