"""ONNX Runtime on the CPU: the default that works anywhere.

Arrays are NumPy arrays, bound by address: inputs are read and outputs written in place, nothing is copied. Weight files
are mapped into memory by ONNX Runtime.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactRefused, BackendUnavailable, InvalidInput, OutOfMemory
from ..manifest import GraphSpec
from ..memory import available_bytes
from ..noise import check_whole
from .base import Availability, check_bindings, host_dtype

MINIMUM = (1, 24)  # older ones read weights from anywhere a graph names
_ONNX_BFLOAT16 = 16  # element type of the ONNX format, for which NumPy has no name
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def probe(name: str) -> Availability:
    wheels = {name: version for name in _WHEELS if (version := _version(name))}
    if len(wheels) > 1:
        names = " and ".join(wheels)
        return Availability(
            False,
            f"{names} are both installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(wheels)} && pip install 'flexvar-deploy[cpu]'",
        )
    wheel = next(iter(wheels), None)
    try:
        version = str(importlib.import_module("onnxruntime").__version__)
    except Exception as error:  # a wheel half removed or made for another system fails in any way
        if wheel is None:
            return Availability(False, "onnxruntime is not installed", "pip install 'flexvar-deploy[cpu]'")
        first = (str(error) or type(error).__name__).splitlines()[0]
        return Availability(False, f"{wheel} cannot be loaded ({first})", f"pip install --force-reinstall {wheel}")
    if tuple(int(part) for part in re.findall("[0-9]+", version)[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        return Availability(
            False,
            f"{wheel or 'onnxruntime'} {version} is older than {wanted}",
            f"pip install '{wheel or 'onnxruntime'}>={wanted}'",
        )
    return Availability(True, f"{wheel or 'onnxruntime'} {version}, {default_threads()} threads")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_threads() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def create(name: str, *, device: str | None, threads: int | None) -> OrtCpu:
    if device not in (None, "cpu"):
        raise InvalidInput(
            f"device {device!r} for ort-cpu", expected="cpu or none", fix="leave it out or choose another backend"
        )
    return OrtCpu(default_threads() if threads is None else check_whole("threads", threads, 1, 1024))


class OrtCpu:
    """Backend on `threads` threads."""

    name = "ort-cpu"
    precisions = frozenset({"fp32", "fp16"})

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def open(self, path: Path, spec: GraphSpec, *, once: bool = False) -> OrtGraph:
        return OrtGraph(path, spec, self.threads, once)

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


class OrtGraph:
    """One session. `once` skips the repacking of weights: they stay mapped from the file and are dropped by `close`."""

    def __init__(self, path: Path, spec: GraphSpec, threads: int, once: bool) -> None:
        ort = importlib.import_module("onnxruntime")
        self.spec = spec
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # nothing but crashes: errors are raised
        if once:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _translate(error, path.name, spec) from error
        self._types = {
            t.name: _ONNX_BFLOAT16 if t.dtype == "bfloat16" else np.dtype(t.dtype)
            for t in (*spec.inputs, *spec.outputs)
        }
        self._stored = {t.name: host_dtype(t.dtype) for t in (*spec.inputs, *spec.outputs)}
        self._name = path.name

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        if self._session is None:
            raise InvalidInput(f"{self._name}, closed", expected="an open graph", fix="open the bundle again")
        check_bindings(self.spec, inputs, outputs)
        for name, array in (*inputs.items(), *outputs.items()):
            if array.dtype != self._stored[name] or not array.flags.c_contiguous:
                raise InvalidInput(
                    f"{name} of {array.dtype}, C-contiguous {array.flags.c_contiguous}",
                    expected=f"C-contiguous {self._stored[name]}",
                    fix="convert it first",
                )
        try:
            binding = self._session.io_binding()
            for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in arrays.items():
                    bind(name, "cpu", 0, self._types[name], array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _translate(error, self._name, self.spec) from error

    def close(self) -> None:
        self._session = None


def _translate(error: Exception, name: str, spec: GraphSpec) -> Exception:
    """ONNX Runtime raises its own types for everything; out of memory and files it refuses have a meaning here."""
    text = str(error)
    first = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
    if (
        isinstance(error, MemoryError)
        or "Failed to allocate" in text
        or "bad_alloc" in text
        or "bad allocation" in text
    ):
        return OutOfMemory(
            f"{name}: {first}", expected="a request that fits in memory", fix="use a smaller batch or schedule"
        )
    if "NOT_IMPLEMENTED" in text or "NotImplemented" in type(error).__name__:
        return BackendUnavailable(
            f"{name}: {first}",
            expected="operators that ort-cpu has",
            fix="export with --precision fp32, or use a GPU backend",
        )
    return ArtifactRefused(
        f"{name}: {first}", expected="a graph this ONNX Runtime can run", fix="export the bundle again"
    )
