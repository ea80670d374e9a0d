"""CUDA's libraries, loaded before a library that needs them and would not look everywhere.

`onnxruntime.preload_dlls()` looks beside the onnxruntime package and in the system's folders. `cuda.pathfinder` looks
in this Python's site-packages, in Conda, in the system's folders and below CUDA_PATH.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

NAMES = (
    "cublasLt",
    "cublas",
    "curand",
    "cudart",
    "cudnn",
)  # what ONNX Runtime's CUDA provider links; pathfinder's names


@dataclass(frozen=True)
class CudaLibrary:
    """One library of CUDA: the file it was loaded from, or the problem that kept it from being loaded."""

    name: str
    path: str | None
    problem: str | None = None


def load_cuda_libraries(importer: Callable[[str], Any] = importlib.import_module) -> tuple[CudaLibrary, ...]:
    """Load every library of `NAMES` into this process, in that order. A library that is already loaded is kept.

    A missing library is reported in the result and in the debug log. It is not an error here: the system may find it.
    """
    try:
        load = importer("cuda.pathfinder").load_nvidia_dynamic_lib
    except Exception as error:  # a wheel half removed fails in any way
        problem = f"cuda.pathfinder cannot be imported ({_first_line(error)})"
        libraries = tuple(CudaLibrary(name, None, problem) for name in NAMES)
    else:
        libraries = tuple(_load(name, load) for name in NAMES)
    for library in libraries:
        log.debug("%s: %s", library.name, library.path or f"not loaded, {library.problem}")
    return libraries


def describe_missing(libraries: Iterable[CudaLibrary]) -> str:
    """The names of the libraries that are missing, for an error message: " (cudnn, curand not found)", or ""."""
    missing = [library.name for library in libraries if library.path is None]
    return f" ({', '.join(missing)} not found)" if missing else ""


def _load(name: str, load: Callable[[str], Any]) -> CudaLibrary:
    try:
        loaded = load(name)
    except Exception as error:  # not found, or a file that the dynamic loader refuses
        return CudaLibrary(name, None, _first_line(error))
    return CudaLibrary(name, str(loaded.abs_path or name))  # no path where the system does not tell it


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
