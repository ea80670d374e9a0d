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
import logging
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..cuda.backend import DeviceArrays
from ..cuda.device import Device
from ..cuda.gpu import CudaDevice, find_gpu, probe_gpu
from ..cuda.libraries import load_cuda_libraries
from ..errors import BackendUnavailable, InvalidInput
from ..graphs import DECODE, STEP
from ..onnx_scan import scan
from .base import Availability, runs_precision
from .ort import OrtGraph, probe_onnxruntime
from .ort_placement import RECORD, require_placed

log = logging.getLogger(__name__)

NOT_CAPTURED = -1  # what ONNX Runtime takes for a run outside any CUDA graph

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
        ort = importlib.import_module("onnxruntime")
        captures, path = graph in CAPTURED, bundle.graph_file(graph)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # nothing but crashes: errors are raised, and placement is checked below
        options.add_session_config_entry(RECORD, "1")
        provider = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "DEFAULT",  # EXHAUSTIVE, its default, times every shape for a second at first
            "use_tf32": "0",
            "enable_cuda_graph": str(int(captures)),
        }

        def run_options(number: int | None) -> Any:
            """number: of the CUDA graph to capture or replay; None for a run that is not captured."""
            made = ort.RunOptions()
            made.add_run_config_entry("disable_synchronize_execution_providers", "1")
            made.add_run_config_entry("gpu_graph_id", str(NOT_CAPTURED if number is None else number))
            return made

        opened = OrtGraph(
            path,
            bundle.graph(graph),
            options=options,
            provider=(PROVIDER, provider),
            place=("cuda", self.device.ordinal),
            address=lambda array: int(array.address),
            run_options=run_options,
            captures=captures,
        )
        if opened.provider != PROVIDER:
            raise BackendUnavailable(
                f"ONNX Runtime that fell back to {opened.provider} for {graph}",
                expected=PROVIDER,
                fix="flexvar doctor; the provider needs a GPU, CUDA 13 and cuDNN 9: pip install 'flexvar-deploy[gpu]'",
            )
        require_placed(opened.session, scan(path), graph, PROVIDER)
        return opened

    def close(self) -> None:
        self.device.close()
