"""ONNX Runtime on an NVIDIA GPU, on the stream of the device and on its memory.

Asked for CUDA where it cannot have it, ONNX Runtime gives a session on the processor and a warning: here that is
refused. Its own TensorRT provider is not used: it needs an older TensorRT.
"""

from __future__ import annotations

import importlib
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

from ..bundle import Bundle
from ..cuda.backend import DeviceArrays
from ..cuda.device import Device
from ..cuda.gpu import CudaDevice, find_gpu, probe_gpu
from ..cuda.libraries import load_cuda_libraries
from ..errors import BackendUnavailable, InvalidInput
from .base import Availability, runs_precision
from .ort import OrtGraph, probe_onnxruntime

log = logging.getLogger(__name__)

PRECISIONS = DeviceArrays.precisions
PROVIDER = "CUDAExecutionProvider"
_EXTRA = "pip uninstall -y onnxruntime && pip install 'flexvar-deploy[gpu]'"


def probe(name: str) -> Availability:
    state = probe_onnxruntime("gpu")
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

    Not captured: ONNX Runtime stages small copies in pinned memory that it uses again after the run, so replaying a
    graph that somebody else captured reads what is there by then (its pull requests 32081 and 32121).
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
        options, run_options = ort.SessionOptions(), ort.RunOptions()
        options.log_severity_level = 3
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        provider = {
            "device_id": str(self.device.ordinal),
            "user_compute_stream": str(self.device.stream),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        opened = OrtGraph(
            bundle.graph_file(graph),
            bundle.graph(graph),
            options=options,
            provider=(PROVIDER, provider),
            place=("cuda", self.device.ordinal),
            address=lambda array: int(array.address),
            run_options=run_options,
        )
        if opened.provider != PROVIDER:
            raise BackendUnavailable(
                f"ONNX Runtime that fell back to {opened.provider} for {graph}",
                expected=PROVIDER,
                fix="flexvar doctor; the provider needs a GPU, CUDA 13 and cuDNN 9: pip install 'flexvar-deploy[gpu]'",
            )
        return opened

    def close(self) -> None:
        self.device.close()
