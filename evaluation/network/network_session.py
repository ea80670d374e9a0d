"""Opens a checked feature network in ONNX Runtime, on the CPU or on an NVIDIA GPU.

The options are those of the runtime's backends ort-cpu and ort-cuda, see `flexvar_runtime.backends.ort`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexvar_runtime import backends
from flexvar_runtime.backends.base import Backend
from flexvar_runtime.backends.loading import load_onnxruntime
from flexvar_runtime.backends.ort.placement import RECORD_ASSIGNMENT, require_placed
from flexvar_runtime.backends.ort.session import ort_errors
from flexvar_runtime.checks import check_choice
from flexvar_runtime.cuda.libraries import describe_missing
from flexvar_runtime.errors import ArtifactRefused, BackendUnavailable
from flexvar_runtime.machine.threads import require_threads

from .network_file import FIX, NetworkFile

BACKENDS = ("ort-cpu", "ort-cuda")
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_SILENT = 4  # FATAL: errors are raised, not logged


class NetworkSession:
    """A session of ONNX Runtime. It runs on arrays in the memory of the process."""

    def __init__(self, name: str, backend: Backend, session: Any) -> None:
        """name: of the file, for messages. backend: is closed with the session."""
        self._name, self._backend, self._session = name, backend, session

    def run(self, inputs: dict[str, Any]) -> list[Any]:
        """All outputs. Raises ArtifactRefused, EnvironmentFailed and OutOfMemory."""
        with network_errors(self._name):
            return list(self._session.run(None, inputs))

    def close(self) -> None:
        """Free the session and the backend."""
        self._session = None
        self._backend.close()


def open_session(file: NetworkFile, backend: str, device: str | None, threads: int | None) -> NetworkSession:
    """Open a checked network.

    backend: one of BACKENDS. It is used or refused, never replaced. Raises InvalidInput, EnvironmentFailed,
    ArtifactRefused and OutOfMemory.
    """
    used = backends.create(check_choice("backend", backend, BACKENDS), device=device, threads=threads)
    try:
        session = _on_gpu(file, used) if used.device is not None else _on_cpu(file, used)
    except BaseException:
        used.close()
        raise
    return NetworkSession(file.path.name, used, session)


@contextmanager
def network_errors(name: str) -> Iterator[None]:
    """Raise ONNX Runtime's errors as errors of the runtime. name: of the network's file."""
    try:
        with ort_errors(name):
            yield
    except ArtifactRefused as error:  # its advice is about bundles
        raise ArtifactRefused(error.got, expected=error.expected, fix=FIX) from error
    except BackendUnavailable as error:
        raise BackendUnavailable(error.got, expected=error.expected, fix="Use the backend ort-cpu.") from error


def _on_cpu(file: NetworkFile, backend: Backend) -> Any:
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = backend.threads, 1
    options.log_severity_level = _SILENT
    options.enable_mem_pattern = False  # with it a batch takes 0.4 GB more, and is no faster
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    require_threads(backend.threads - 1)  # the caller's thread is one of them
    return _session(file, options, (_CPU, {}))


def _on_gpu(file: NetworkFile, backend: Any) -> Any:
    """ONNX Runtime is refused if it would compute on the CPU or with rounded factors (TF32)."""
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    provider = {
        "device_id": str(backend.device.ordinal),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }
    session = _session(file, options, (_CUDA, provider))
    with network_errors(file.path.name):
        first = str(session.get_providers()[0])
        if first != _CUDA:
            missing = describe_missing(backend.cuda_libraries)
            got = f"ONNX Runtime opened {file.path.name} with {first} instead of CUDA{missing}."
            raise BackendUnavailable(got, expected=_CUDA, fix="")
        require_placed(session, file.scan, file.path.name, _CUDA)
    return session


def _session(file: NetworkFile, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """A session of the bytes that were checked. The file may have changed since."""
    ort = load_onnxruntime()
    with network_errors(file.path.name):
        return ort.InferenceSession(file.content, options, providers=[provider], enable_fallback=0)
