"""ONNX Runtime on an NVIDIA GPU. It works on the stream and in the memory of our device.

If CUDA is missing, ONNX Runtime only warns and opens a session on the CPU. A node without a CUDA kernel runs on the CPU
silently. This backend raises BackendUnavailable in both cases. It does not use ONNX Runtime's TensorRT provider, which
needs an older TensorRT.

A step has hundreds of small kernels that take longer to launch than to run. So ONNX Runtime captures a CUDA graph for
every binding of the step and of the decoder, and replays it.
"""

from __future__ import annotations

import io
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ...bundle.opening import Bundle
from ...cuda.device import Device
from ...cuda.gpu import CudaDevice, find_gpu
from ...cuda.libraries import describe_missing, load_cuda_libraries
from ...errors import BackendUnavailable, FlexVARError, InvalidInput
from ...model.signatures import DECODE, STEP
from ..base import Arrays, Availability, refuse_option, runs_precision
from ..device_arrays import DeviceBackend, probe_gpu
from ..loading import load_onnxruntime
from .placement import EXPORT_FOR_GPU, RECORD_ASSIGNMENT, count_operators, require_placed, without_cuda_kernel
from .session import OrtGraph, open_session, probe_onnxruntime

log = logging.getLogger(__name__)

NOT_CAPTURED = -1  # ONNX Runtime's number for a run outside any CUDA graph
UNUSED_KEPT = 256  # most CUDA graphs of closed bindings (a shape has 10 to 15) before the session is opened again
THREADS_KEPT = 4  # most threads that capture one binding before the session is opened again
SILENT = 4  # FATAL: errors are raised, not logged

PRECISIONS = DeviceBackend.precisions
PROVIDER = "CUDAExecutionProvider"
MINIMUM = "1.31.1"  # the version that ran on a GPU, and whose CUDA kernels `placement` lists
CAPTURED = frozenset({STEP, DECODE})  # graphs that run many times with the same addresses
_EXTRA = "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"


def probe(name: str) -> Availability:
    state = probe_onnxruntime("gpu")
    if not state.available:
        return state
    ort = load_onnxruntime()
    if PROVIDER not in getattr(ort, "get_available_providers", list)():
        return Availability(False, f"{state.detail} is built without CUDA", _EXTRA)
    state = probe_onnxruntime("gpu", MINIMUM)
    if not state.available:
        return state
    gpu = probe_gpu()
    if not gpu.available:
        return Availability(False, f"{state.detail} is installed, but {gpu.detail}", gpu.fix)
    missing = describe_missing(load_cuda_libraries())
    return Availability(True, f"{state.detail}, {gpu.detail}{missing}")


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    """Whether the precision fits and ONNX Runtime has a CUDA kernel for every node of the bundle's graphs."""
    state = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    if not state.available:
        return state
    for graph in bundle.manifest.graphs:
        missing = without_cuda_kernel(bundle.scan(graph))
        if missing:
            counts = count_operators(node.operator for node in missing)
            return Availability(False, f"{name} has no CUDA kernel for {counts} in {graph}", EXPORT_FOR_GPU)
    return state


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None) -> OrtCuda:
    refuse_option("threads", threads, name, "a CPU backend")
    refuse_option("engines", engines, name, "a TensorRT backend")
    return OrtCuda(CudaDevice(find_gpu(device)))


class OrtCuda(DeviceBackend):
    """The backend ort-cuda on a device.

    Its graphs cannot be part of our captured CUDA graph. ONNX Runtime copies through pinned memory that it reuses after
    a run, so our replay would read overwritten data (its pull requests 32081 and 32121). CUDA graphs that ONNX Runtime
    captures itself are safe.

    Opening the backend silences ONNX Runtime's default logger in this process. The CUDA provider writes dozens of lines
    there while it searches convolutions.
    """

    captures = False

    def __init__(self, device: Device) -> None:
        super().__init__("ort-cuda", device)
        self.cuda_libraries = load_cuda_libraries()  # first, because `preload_dlls` searches fewer places
        ort = load_onnxruntime()
        ort.set_default_logger_severity(SILENT)
        preload = getattr(ort, "preload_dlls", None)
        if preload is not None:  # loads CUDA's libraries from their wheels
            printed = io.StringIO()
            with redirect_stdout(printed):
                preload()
            log.debug("%s", printed.getvalue().strip())

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        """Open a session that enqueues on the device's stream. `once` changes nothing: weights stay on the GPU."""
        spec = bundle.graph(graph)
        options: dict[str, Any] = {
            "opener": lambda: self._open_session(bundle, graph),
            "place": ("cuda", self.device.ordinal),
            "address": lambda array: int(array.address),
            "run_options": run_options(NOT_CAPTURED),
        }
        if graph in CAPTURED:
            return CapturingGraph(spec.file, spec, wait=self.device.synchronize, **options)
        return OrtGraph(spec.file, spec, **options)

    def _open_session(self, bundle: Bundle, graph: str) -> Any:
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = SILENT  # `require_placed` checks what the log would say
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        provider = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",  # the decoder takes twice as long under EXHAUSTIVE, the default
            "use_tf32": "0",
            "enable_cuda_graph": str(int(graph in CAPTURED)),
        }
        session = open_session(bundle, graph, options, (PROVIDER, provider))
        first = str(session.get_providers()[0])
        if first != PROVIDER:
            raise BackendUnavailable(
                f"ONNX Runtime opened {graph} with {first} instead of CUDA{describe_missing(self.cuda_libraries)}.",
                expected=PROVIDER,
                fix="Install CUDA 13 and cuDNN 9 with: pip install 'flexvar-deploy[gpu]'",
            )
        require_placed(session, bundle.scan(graph), graph, PROVIDER)
        return session


def run_options(cuda_graph: int) -> Any:
    """Options of a run that only enqueues. cuda_graph: number of the CUDA graph to capture or replay."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    options.add_run_config_entry("gpu_graph_id", str(cuda_graph))
    return options


class CapturingGraph(OrtGraph):
    """A graph whose bindings ONNX Runtime captures as CUDA graphs, each at its first run.

    A CUDA graph reads and writes the addresses that it was captured with. So every binding gets its own number, and a
    number is never used again. ONNX Runtime captures a number once in every thread that runs it, and frees CUDA graphs
    only with their session. So this class frees the session when UNUSED_KEPT CUDA graphs belong to closed bindings, or
    when one more than THREADS_KEPT threads run a binding. The next run opens a new session and captures the bindings
    that are still in use again.
    """

    def __init__(self, *args: Any, wait: Callable[[], None], **options: Any) -> None:
        """wait: waits for the device. It is called before a session is freed."""
        super().__init__(*args, **options)
        self.numbers = itertools.count(1)
        """The numbers of the next CUDA graphs."""
        self.unused = 0
        """The number of CUDA graphs that will not be replayed again."""
        self._wait = wait
        self._bounds: weakref.WeakSet[CapturedBound] = weakref.WeakSet()

    def bind(self, inputs: Arrays, outputs: Arrays) -> CapturedBound:
        bound = CapturedBound(self, inputs, outputs)
        self._bounds.add(bound)
        return bound

    def remove(self, bound: CapturedBound) -> None:
        """Remove a closed binding. Frees the session if too many of its CUDA graphs are unused."""
        self._bounds.discard(bound)
        if self.unused >= UNUSED_KEPT:
            self.free_cuda_graphs()

    def free_cuda_graphs(self) -> None:
        """Free the session with all its CUDA graphs. The next run opens a new one."""
        self._wait()
        for bound in self._bounds:
            bound.detach()  # a binding keeps its session alive
        log.info("%s: opens its session again, to free %d unused CUDA graphs", self.name, self.unused)
        self.free_session()
        self.unused = 0


class CapturedBound:
    """Arrays that are bound to the current session of a graph, and the number of their CUDA graph."""

    def __init__(self, graph: CapturingGraph, inputs: Arrays, outputs: Arrays) -> None:
        self._graph = graph
        self._arrays: tuple[Arrays, Arrays] | None = (inputs, outputs)
        self._binding: Any = None
        self._options: Any = None
        self._threads: set[threading.Thread] = set()  # captured in these; objects, because thread ids are reused
        self._attach()

    def _attach(self) -> None:
        if self._arrays is None:
            got = f"This binding of {self._graph.name} is closed."
            raise InvalidInput(got, expected="an open binding", fix="Bind the graph again.")
        self._binding = self._graph.binding(*self._arrays)
        self._options = run_options(next(self._graph.numbers))

    def detach(self) -> None:
        """Drop the session's binding and its CUDA graphs. The next run makes new ones."""
        self._binding = self._options = None
        self._graph.unused += len(self._threads)
        self._threads.clear()

    def run(self) -> None:
        thread = threading.current_thread()
        if thread not in self._threads and len(self._threads) >= THREADS_KEPT:
            self._graph.free_cuda_graphs()
        if self._binding is None:
            self._attach()
        self._threads.add(thread)
        try:
            self._graph.run_binding(self._binding, self._options)
        except FlexVARError:
            self.detach()  # the capture of a failed run must not be replayed
            raise

    def close(self) -> None:
        if self._arrays is not None:
            self._arrays = None
            self.detach()
            self._graph.remove(self)
