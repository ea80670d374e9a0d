"""Load CUDA's libraries before ONNX Runtime needs them, because it does not find them everywhere.

`onnxruntime.preload_dlls()` searches beside the onnxruntime package and in the system's folders. `cuda.pathfinder` also
searches this Python's site-packages, Conda and CUDA_PATH.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import first_line

log = logging.getLogger(__name__)

NAMES = ("cublasLt", "cublas", "curand", "cudart", "cudnn")
"""The libraries that ONNX Runtime's CUDA provider links, as cuda.pathfinder names them."""


@dataclass(frozen=True)
class CudaLibrary:
    """One library of CUDA. path: the file it was loaded from. problem: why it could not be loaded."""

    name: str
    path: str | None
    problem: str | None = None


def load_cuda_libraries(
    importer: Callable[[str], Any] = importlib.import_module, names: tuple[str, ...] = NAMES
) -> tuple[CudaLibrary, ...]:
    """Load libraries into this process, in that order. A library that is loaded already is kept.

    names: as cuda.pathfinder names them. A missing library is no error, because the system may find it. The result and
    the debug log report it.
    """
    try:
        load = importer("cuda.pathfinder").load_nvidia_dynamic_lib
        libraries = tuple(_load(name, load) for name in names)
    except Exception as error:  # a damaged wheel can raise any error
        problem = f"cuda.pathfinder cannot be imported ({first_line(error)})"
        libraries = tuple(CudaLibrary(name, None, problem) for name in names)
    for library in libraries:
        log.debug("%s: %s", library.name, library.path or f"not loaded, {library.problem}")
    return libraries


def describe_missing(libraries: Iterable[CudaLibrary]) -> str:
    """The names of missing libraries as the end of a message, such as " (cudnn, curand not found)"; "" if none."""
    missing = [library.name for library in libraries if library.path is None]
    return f" ({', '.join(missing)} not found)" if missing else ""


def _load(name: str, load: Callable[[str], Any]) -> CudaLibrary:
    try:
        loaded = load(name)
    except Exception as error:  # not found, or refused by the dynamic loader
        return CudaLibrary(name, None, first_line(error))
    return CudaLibrary(name, str(loaded.abs_path or name))  # the system may not know the path
