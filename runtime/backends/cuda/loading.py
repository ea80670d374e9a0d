"""Load the Python modules of cuBLASLt and cuDNN, and translate the errors that they raise."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...checks import version_numbers
from ...cuda.device import Device
from ...cuda.libraries import load_cuda_libraries
from ...errors import BackendUnavailable, DeviceFailed, FlexVARError, OutOfMemory, first_line

CUBLASLT, CUDNN = "cuBLASLt", "cuDNN"
FIX = "Run: pip install 'flexvar-deploy[gpu]'"

_NVMATH_VERSIONS = (1, 0), (2,)  # the first that works, and the first that does not
_CUDNN_VERSIONS = (1, 24), (1, 25)
_CUBLASLT_NAMES = ("cublasLt",)
_CUDNN_NAMES = ("nvrtc", "cublasLt", "cublas", "cudart", "cudnn")  # cuDNN looks for the others by name
_OTHER_DEVICE = "Use another backend, such as --backend ort-cuda."
_importing = threading.RLock()


def load_cublaslt() -> Any:
    """The module nvmath.bindings.cublasLt. Raises BackendUnavailable if it or cuBLASLt is missing or damaged."""
    with _importing:
        _load_library("cublasLt", _CUBLASLT_NAMES, CUBLASLT)
        with _translating_import("nvmath-python"):
            module = importlib.import_module("nvmath.bindings.cublasLt")
            version = str(importlib.import_module("nvmath").__version__)
        _check_version("nvmath-python", version, *_NVMATH_VERSIONS)
        return module


def load_cudnn() -> Any:
    """The module cudnn, without torch. Raises BackendUnavailable if it or cuDNN is missing or damaged.

    The module imports torch if it can, which takes seconds. So it does not find torch, unless torch is imported
    already.
    """
    with _importing:
        _load_library("cudnn", _CUDNN_NAMES, CUDNN)
        with _translating_import("nvidia-cudnn-frontend"):
            module = import_cudnn()
            version = str(module.__version__)
        _check_version("nvidia-cudnn-frontend", version, *_CUDNN_VERSIONS)
        return module


def import_cudnn() -> Any:
    """Import cudnn so that it does not import torch. Raises whatever importing a missing or damaged wheel raises."""
    with _importing:
        modules: dict[str, Any] = sys.modules
        if "torch" in modules:
            return importlib.import_module("cudnn")
        modules["torch"] = None  # importing it raises ImportError
        try:
            module = importlib.import_module("cudnn")
            module.datatypes.is_torch_available()  # it asks once and keeps the answer
            return module
        finally:
            if modules.get("torch", modules) is None:
                del modules["torch"]


@contextmanager
def translating(library: str, device: Device, what: str, *, opening: bool = False) -> Iterator[None]:
    """Raise the errors of a library as OutOfMemory or DeviceFailed. what: what is done, for the message.

    opening: whether the library is being opened. Then BackendUnavailable takes the place of DeviceFailed.
    """
    try:
        yield
    except FlexVARError:
        raise
    except Exception as error:  # the libraries have no common base class
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"{library} ran out of memory on {device.name} when {what} ({first_line(error)}).",
                expected="a request that fits in its memory",
                fix="Use a smaller batch or schedule, or end other programs that use the GPU.",
            ) from error
        if opening:
            raise BackendUnavailable(
                f"{library} does not work on {device.name}: {first_line(error)}.",
                expected=f"a {library} that works on this GPU",
                fix=f"Run flexvar doctor. {_OTHER_DEVICE}",
            ) from error
        raise DeviceFailed(
            f"{library} failed on {device.name} when {what} ({first_line(error)}).",
            expected=f"work that {library} can do",
            fix="Run it again. If it fails again, check the GPU with flexvar doctor.",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library's error says that memory is missing."""
    text = str(error)
    return any(words in text for words in ("OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED"))


def no_algorithm(library: str, what: str, reason: str = "") -> BackendUnavailable:
    """The error for work that a library has no algorithm for. what: the work and its sizes. reason: of the library."""
    return BackendUnavailable(
        f"{library} has no algorithm for {what}{f' ({reason})' if reason else ''}.",
        expected=f"sizes that {library} has an algorithm for",
        fix=_OTHER_DEVICE,
    )


def _load_library(name: str, names: tuple[str, ...], library: str) -> None:
    """Load shared libraries. Raises BackendUnavailable if the one with that name is missing."""
    found = {entry.name: entry for entry in load_cuda_libraries(importlib.import_module, names)}
    problem = found[name].problem
    if problem is not None:
        raise BackendUnavailable(
            f"The shared library of {library} cannot be loaded ({problem}).",
            expected=f"the shared library of {library}",
            fix=FIX,
        )


@contextmanager
def _translating_import(package: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged wheel can raise any error
        raise BackendUnavailable(
            f"The package {package} cannot be imported ({first_line(error)}).",
            expected=f"the package {package}",
            fix=FIX,
        ) from error


def _check_version(package: str, version: str, first: tuple[int, ...], end: tuple[int, ...]) -> None:
    if not first <= version_numbers(version) < end:
        wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, end))}"
        raise BackendUnavailable(
            f"{package} is version {version}, but this backend needs {wanted}.", expected=f"{package}{wanted}", fix=FIX
        )
