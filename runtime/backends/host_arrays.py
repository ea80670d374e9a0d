"""The base of all CPU backends: arrays are NumPy arrays, bound by address."""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import check_whole
from ..errors import InvalidInput, OutOfMemory
from ..machine.processors import default_threads
from ..memory.available import available_bytes
from ..memory.library import LibraryMemory
from ..model.precision import Precision
from ..model.tensors import host_dtype
from .base import Backend, refuse_option

MAX_THREADS = 1024


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model name of the processor; "unknown" if the system does not know it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "unknown"


def check_options(name: str, device: str | None, threads: int | None, engines: Path | None) -> int:
    """The number of threads to use. Raises InvalidInput for options that a CPU backend does not take."""
    refuse_option("engines", engines, name, "a TensorRT backend")
    if device not in (None, "cpu"):
        raise InvalidInput(
            f"device is {device!r}, but backend {name} runs on the CPU.",
            expected="cpu or none",
            fix="Leave out device, or name a GPU backend.",
        )
    return default_threads() if threads is None else check_whole("threads", threads, 1, MAX_THREADS)


class HostBackend(Backend):
    """A backend whose arrays are in the memory of the process.

    maps_weights: whether a graph that is opened with `once` uses its weights from the mapped file. It then opens fast
    and takes no memory for float32 weights. Weights in half precision are widened to float32 in memory.
    """

    labels_per_run = 2
    maps_weights = False
    device = None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def libraries(self, precision: Precision) -> Mapping[str, LibraryMemory]:
        """The memory of the library that runs each graph of a bundle of this precision."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        try:
            return np.empty(shape, host_dtype(dtype))
        except MemoryError as error:
            raise OutOfMemory(
                f"A buffer of shape {shape} and dtype {dtype} does not fit in memory.",
                expected="a buffer that fits",
                fix="Use a smaller batch.",
            ) from error

    def upload(self, host: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(host)

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def available_bytes(self) -> int | None:
        return available_bytes()

    def close(self) -> None:
        """See `Backend.close`. Most libraries hold nothing that a backend must free."""


def require_contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself. Raises InvalidInput unless it is C-contiguous: it is bound by address."""
    if not array.flags.c_contiguous:
        raise InvalidInput(
            "Only a C-contiguous array can be bound.", expected="a C-contiguous array", fix="Copy the array first."
        )
    return array
