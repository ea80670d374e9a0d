"""What the backends on the processor share: arrays are NumPy arrays, bound by address, and so many threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidInput, OutOfMemory
from ..memory import available_bytes
from ..noise import check_whole
from .base import host_dtype

MAX_THREADS = 1024


def default_threads() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_options(name: str, device: str | None, threads: int | None, engines: Path | None) -> int:
    """Threads to use. Raises InvalidInput for what a backend on the processor does not take."""
    if engines is not None:
        raise InvalidInput(f"engines for {name}", expected="none", fix="leave them out or name a TensorRT backend")
    if device not in (None, "cpu"):
        raise InvalidInput(
            f"device {device!r} for {name}", expected="cpu or none", fix="leave it out or choose another backend"
        )
    return default_threads() if threads is None else check_whole("threads", threads, 1, MAX_THREADS)


class HostBackend:
    """The part of a backend that is the same for every library: arrays in the process's own memory."""

    labels_per_run = 2
    captures = False
    bf16_arithmetic = False
    maps_weights = False
    device = None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def empty(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        try:
            return np.empty(shape, host_dtype(dtype))
        except MemoryError as error:
            raise OutOfMemory(
                f"a buffer of {shape} {dtype}", expected="one that fits", fix="use a smaller batch"
            ) from error

    def upload(self, host: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(host)

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def available_bytes(self) -> int | None:
        return available_bytes()

    def close(self) -> None:
        pass


def require_contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself. Raises InvalidInput: bound by address, a strided one would be read wrongly."""
    if not array.flags.c_contiguous:
        raise InvalidInput("an array that is not contiguous", expected="a C-contiguous array", fix="copy it first")
    return array
