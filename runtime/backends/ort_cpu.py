"""ONNX Runtime on the CPU: the default that works anywhere.

Arrays are NumPy arrays, bound by address: inputs are read and outputs written in place, nothing is copied. Weight files
are mapped into memory by ONNX Runtime.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InvalidInput, OutOfMemory
from ..memory import available_bytes
from ..noise import check_whole
from .base import Availability, host_dtype, runs_precision
from .ort import OrtGraph, probe_onnxruntime


def probe(name: str) -> Availability:
    state = probe_onnxruntime("cpu")
    return replace(state, detail=f"{state.detail}, {default_threads()} threads") if state.available else state


def default_threads() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    return runs_precision(name, bundle.manifest.precision, OrtCpu.precisions)


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None = None) -> OrtCpu:
    if engines is not None:
        raise InvalidInput("engines for ort-cpu", expected="none", fix="leave them out or name a TensorRT backend")
    if device not in (None, "cpu"):
        raise InvalidInput(
            f"device {device!r} for ort-cpu", expected="cpu or none", fix="leave it out or choose another backend"
        )
    return OrtCpu(default_threads() if threads is None else check_whole("threads", threads, 1, 1024))


class OrtCpu:
    """Backend on `threads` threads."""

    name = "ort-cpu"
    precisions = frozenset({"fp32", "fp16"})
    labels_per_run = 2
    captures = False
    device = None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        """`once` skips the repacking of weights: they stay mapped from the file and are dropped by `close`."""
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4  # nothing but crashes: errors are raised
        if once:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        return OrtGraph(
            bundle.graph_file(graph),
            bundle.graph(graph),
            options=options,
            provider=("CPUExecutionProvider", {}),
            place=("cpu", 0),
            address=_address,
        )

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


def _address(array: NDArray[Any]) -> int:
    if not array.flags.c_contiguous:
        raise InvalidInput("an array that is not contiguous", expected="a C-contiguous array", fix="copy it first")
    return int(array.ctypes.data)
