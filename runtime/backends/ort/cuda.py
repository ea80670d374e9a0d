"""ONNX Runtime on an NVIDIA GPU, on the stream of the device and on its memory.

If CUDA is missing, ONNX Runtime opens a session on the CPU and only warns. Nodes without a CUDA kernel run on the CPU
silently. This backend raises BackendUnavailable in both cases. ONNX Runtime's own TensorRT provider is not used: it
needs an older TensorRT.

A step has hundreds of small kernels, which take longer to launch than to run. So ONNX Runtime captures a CUDA graph for
every binding of the step and of the decoder, and replays it.
"""

from __future__ import annotations

import importlib
import io
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ...bundle.onnx_scan import scan
from ...bundle.opening import Bundle
from ...cuda.device import Device
from ...cuda.gpu import CudaDevice, find_gpu
from ...cuda.libraries import describe_missing, load_cuda_libraries
from ...errors import BackendUnavailable, FlexVARError, InvalidInput
from ...model.signatures import DECODE, STEP
from ..base import Array, Availability, runs_precision
from ..device_arrays import DeviceBackend, probe_gpu
from .placement import EXPORT_FOR_GPU, RECORD_ASSIGNMENT, count_operators, require_placed, without_cuda_kernel
from .session import OrtGraph, open_session, probe_onnxruntime

log = logging.getLogger(__name__)

NOT_CAPTURED = -1  # what ONNX Runtime takes for a run outside any CUDA graph
UNUSED_KEPT = 256  # CUDA graphs of closed bindings, 10 to 15 of a shape, before their session is opened anew
THREADS_KEPT = 4  # threads that a binding is captured in, before its session is opened anew
SILENT = 4  # FATAL: ONNX Runtime logs nothing that it raises

PRECISIONS = DeviceBackend.precisions
PROVIDER = "CUDAExecutionProvider"
MINIMUM = "1.31.1"  # the version that was run on a GPU, and whose CUDA kernels `ort_placement` lists
CAPTURED = frozenset({STEP, DECODE})  # graphs that are run again and again with the same addresses
_EXTRA = "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"


def probe(name: str) -> Availability:
    state = probe_onnxruntime("gpu")
    if not state.available:
        return state
    ort = importlib.import_module("onnxruntime")
    if PROVIDER not in getattr(ort, "get_available_providers", list)():
        return Availability(False, f"{state.detail} is built without CUDA", _EXTRA)
    state = probe_onnxruntime("gpu", MINIMUM)
    if not state.available:
        return state
    gpu = probe_gpu()
    if not gpu.available:
        return Availability(False, f"{state.detail}, {gpu.detail}", gpu.fix)
    missing = describe_missing(load_cuda_libraries())
    return Availability(True, f"{state.detail}, {gpu.detail}, refuses graphs with nodes on the CPU{missing}")


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether it runs the bundle's precision and ONNX Runtime has a CUDA kernel for every node of its graphs."""
    state = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not state.available:
        return state
    for graph in bundle.manifest.graphs:
        missing = without_cuda_kernel(scan(bundle.graph_file(graph)))
        if missing:
            counts = count_operators(node.operator for node in missing)
            return Availability(False, f"{name} has no CUDA kernel for {counts} of {graph}", EXPORT_FOR_GPU)
    return state


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> OrtCuda:
    for what, given in (("threads", threads), ("engines", engines)):
        if given is not None:
            raise InvalidInput(f"{what} {given} for {name}", expected="none", fix="leave them out")
    return OrtCuda(CudaDevice(find_gpu(device)))


class OrtCuda(DeviceBackend):
    """Backend on a device.

    A whole generation is not captured. ONNX Runtime copies through pinned memory that it reuses after the run, so a
    replay of a CUDA graph that somebody else captured would read overwritten data (its pull requests 32081 and 32121).
    Its own CUDA graphs are safe.

    Opening it silences ONNX Runtime's default logger in this process: the CUDA provider writes dozens of lines there
    while it looks for convolutions.
    """

    captures = False

    def __init__(self, device: Device) -> None:
        super().__init__("ort-cuda", device)
        self.libraries = load_cuda_libraries()  # before `preload_dlls`, which looks beside the package
        ort = importlib.import_module("onnxruntime")
        ort.set_default_logger_severity(SILENT)
        preload = getattr(ort, "preload_dlls", None)
        if preload is not None:  # CUDA's libraries from their wheels, where they are not the system's
            said = io.StringIO()
            with redirect_stdout(said):
                preload()
            log.debug("%s", said.getvalue().strip())

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        """Open a session that enqueues on the device's stream. `once` makes no difference: weights stay there."""
        path, spec = bundle.graph_file(graph), bundle.graph(graph)
        captured = graph in CAPTURED
        opened = (CapturingGraph if captured else OrtGraph)(
            path.name,
            spec,
            opener=lambda: self._open_session(path, graph, captured),
            place=("cuda", self.device.ordinal),
            address=lambda array: int(array.address),
            run_options=run_options(NOT_CAPTURED),
        )
        if isinstance(opened, CapturingGraph):
            opened.wait = self.device.synchronize
        return opened

    def _open_session(self, path: Path, graph: str, captured: bool) -> Any:
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.log_severity_level = SILENT  # errors are raised, and placement is checked below
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
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


def run_options(cuda_graph: int) -> Any:
    """Options of a run that only enqueues. cuda_graph: number of the CUDA graph that it captures or replays."""
    made = importlib.import_module("onnxruntime").RunOptions()
    made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    made.add_run_config_entry("gpu_graph_id", str(cuda_graph))
    return made


class CapturingGraph(OrtGraph):
    """A graph whose bindings ONNX Runtime captures as CUDA graphs, each at its first run.

    A CUDA graph reads and writes the addresses that it was captured with. So every binding has a number of its own, and
    no number is given twice. ONNX Runtime captures a number once in every thread that runs it, and frees CUDA graphs
    only with their session. Once UNUSED_KEPT of them belong to closed bindings, or a binding was captured in
    THREADS_KEPT threads and another one comes, the session is freed. The next run opens another, and bindings that are
    still in use are captured again.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.wait: Callable[[], None] = lambda: None
        """Waits for the device, before a session is freed."""
        self._numbers = itertools.count(1)
        self._bounds: weakref.WeakSet[CapturedBound] = weakref.WeakSet()
        self._unused = 0

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> CapturedBound:
        bound = CapturedBound(self, inputs, outputs)
        self._bounds.add(bound)
        return bound

    def next_number(self) -> int:
        return next(self._numbers)

    def count_unused(self, cuda_graphs: int) -> None:
        """Count CUDA graphs that will not be replayed again."""
        self._unused += cuda_graphs

    def forget(self, bound: CapturedBound) -> None:
        """Take a closed binding off the list, and free the session where too much of it is unused."""
        self._bounds.discard(bound)
        if self._unused >= UNUSED_KEPT:
            self.start_anew()

    def start_anew(self) -> None:
        """Free the session with all its CUDA graphs."""
        self.wait()
        for bound in self._bounds:
            bound.detach()  # a binding keeps its session
        log.info("%s: its session is opened anew, to free %d unused CUDA graphs", self.name, self._unused)
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
        self._threads: set[threading.Thread] = set()  # that have captured it; their numbers are used again
        self._attach()

    def _attach(self) -> None:
        if self._arrays is None:
            raise InvalidInput(
                f"a closed binding of {self._graph.name}", expected="a binding in use", fix="bind the graph again"
            )
        self._binding = self._graph.binding(*self._arrays)
        self._options = run_options(self._graph.next_number())

    def detach(self) -> None:
        """Give up the binding and its CUDA graphs; the next run makes others."""
        self._binding = self._options = None
        self._graph.count_unused(len(self._threads))
        self._threads.clear()

    def run(self) -> None:
        thread = threading.current_thread()
        if thread not in self._threads and len(self._threads) >= THREADS_KEPT:
            self._graph.start_anew()
        if self._binding is None:
            self._attach()
        self._threads.add(thread)
        try:
            self._graph.run_binding(self._binding, self._options)
        except FlexVARError:
            self.detach()  # what was captured of a run that failed must not be replayed
            raise

    def close(self) -> None:
        if self._arrays is not None:
            self._arrays = None
            self.detach()
            self._graph.forget(self)
