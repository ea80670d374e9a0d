"""What both ONNX Runtime backends share: is it installed, a session whose arrays are bound by address, its errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactRefused, BackendUnavailable, FlexVARError, InvalidInput, OutOfMemory
from ..manifest import GraphSpec
from .base import Array, Availability, check_bindings

MINIMUM = "1.24"  # older ones read weights from anywhere a graph names
_ONNX_BFLOAT16 = 16  # element type of the ONNX format, for which NumPy has no name
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def probe_onnxruntime(extra: str, minimum: str = MINIMUM) -> Availability:
    """Whether one ONNX Runtime, `minimum` or later, can be loaded; `extra` is the one of ours that installs it."""
    wheels = _wheels()
    if len(wheels) > 1:
        names = " and ".join(wheels)
        return Availability(
            False,
            f"{names} are both installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(wheels)} && pip install 'flexvar-deploy[{extra}]'",
        )
    wheel = next(iter(wheels), None)
    try:
        version = str(importlib.import_module("onnxruntime").__version__)
    except Exception as error:  # a wheel half removed or made for another system fails in any way
        if wheel is None:
            return Availability(False, "onnxruntime is not installed", f"pip install 'flexvar-deploy[{extra}]'")
        first = (str(error) or type(error).__name__).splitlines()[0]
        return Availability(False, f"{wheel} cannot be loaded ({first})", f"pip install --force-reinstall {wheel}")
    if _numbers(version) < _numbers(minimum):
        return Availability(
            False,
            f"{wheel or 'onnxruntime'} {version} is older than {minimum}",
            f"pip install '{wheel or 'onnxruntime'}>={minimum}'",
        )
    return Availability(True, f"{wheel or 'onnxruntime'} {version}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall("[0-9]+", version)[:3])


def _wheels() -> list[str]:
    """Wheels in the folder from which Python takes onnxruntime: others, in folders behind it, do no harm."""
    folders: dict[str, list[str]] = {}
    for name in _WHEELS:
        with suppress(importlib.metadata.PackageNotFoundError):
            folder = os.path.realpath(str(importlib.metadata.distribution(name).locate_file("")))
            folders.setdefault(folder, []).append(name)
    for folder in map(os.path.realpath, sys.path):
        if folder in folders:
            return folders[folder]
    return [name for names in folders.values() for name in names]


class OrtGraph:
    """One session. Arrays are bound by address: inputs are read and outputs written in place, nothing is copied."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        *,
        options: Any,
        provider: tuple[str, dict[str, str]],
        place: tuple[str, int],
        address: Callable[[Array], int],
        run_options: Callable[[int | None], Any] = lambda _: None,
        captures: bool = False,
    ) -> None:
        """place: device type and number as ONNX Runtime names them; address: where an array lies there.

        captures: the provider replays a CUDA graph of its own for every binding, from its second run on. run_options:
        makes the options of a run from the number of that CUDA graph, None for what is run once.
        """
        self.spec, self._name, self._place, self._address = spec, path.name, place, address
        self._run_options, self._run_once = run_options, run_options(None)
        self._graph_ids = itertools.count(1) if captures else None
        ort = importlib.import_module("onnxruntime")
        try:
            self._session: Any = ort.InferenceSession(
                str(path),
                options,
                providers=[provider],
                enable_fallback=0,  # else it tries the CPU, and says so on standard output
            )
        except Exception as error:
            raise _translate(error, self._name) from error
        self.provider = str(self._session.get_providers()[0])
        self._types = {
            t.name: _ONNX_BFLOAT16 if t.dtype == "bfloat16" else np.dtype(t.dtype)
            for t in (*spec.inputs, *spec.outputs)
        }

    most_images = None  # any number

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    @property
    def session(self) -> Any:
        """ONNX Runtime's own session. Raises InvalidInput once the graph is closed."""
        if self._session is None:
            raise InvalidInput(f"{self._name}, closed", expected="an open graph", fix="open the bundle again")
        return self._session

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> OrtBound:
        """A number of a CUDA graph is never given twice: what was captured for it reads and writes these addresses."""
        if self._graph_ids is None:
            return OrtBound(self, self._binding(inputs, outputs), self._run_once, (inputs, outputs))
        number = next(self._graph_ids)
        binding = self._binding(inputs, outputs)
        return OrtBound(self, binding, self._run_options(number), (inputs, outputs), captured=number)

    def _binding(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
        session = self.session
        check_bindings(self.spec, inputs, outputs)
        try:
            binding = session.io_binding()
            for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in arrays.items():
                    bind(name, *self._place, self._types[name], array.shape, self._address(array))
        except FlexVARError:
            raise
        except Exception as error:
            raise _translate(error, self._name) from error
        return binding

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self.run_bound(self._binding(inputs, outputs), self._run_once)

    def run_bound(self, binding: Any, run_options: Any) -> None:
        session = self.session
        try:
            session.run_with_iobinding(binding, run_options)
        except Exception as error:
            raise _translate(error, self._name) from error

    def release(self, number: int) -> None:
        """Free the CUDA graph of this number; nothing where the graph is closed, which frees all."""
        if self._session is not None:
            self._session.release_captured_graph(number)

    def close(self) -> None:
        self._session = None


class OrtBound:
    """Addresses bound to a session. It keeps the arrays, which the binding does not."""

    def __init__(
        self, graph: OrtGraph, binding: Any, run_options: Any, arrays: object, captured: int | None = None
    ) -> None:
        """captured: number of the CUDA graph that ONNX Runtime captures for it."""
        self._graph, self._binding, self._arrays = graph, binding, arrays
        self._run_options, self._captured = run_options, captured

    def run(self) -> None:
        self._graph.run_bound(self._binding, self._run_options)

    def close(self) -> None:
        if self._captured is not None and self._binding is not None:
            self._graph.release(self._captured)
        self._binding = self._arrays = None


def _translate(error: Exception, name: str) -> Exception:
    """ONNX Runtime raises its own types for everything; out of memory and files it refuses have a meaning here."""
    text = str(error)
    first = text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__
    memory = ("Failed to allocate", "bad_alloc", "bad allocation", "out of memory")
    if isinstance(error, MemoryError) or any(sign in text for sign in memory):
        return OutOfMemory(
            f"{name}: {first}", expected="a request that fits in memory", fix="use a smaller batch or schedule"
        )
    if "NOT_IMPLEMENTED" in text or "NotImplemented" in type(error).__name__:
        return BackendUnavailable(
            f"{name}: {first}",
            expected="operators that this backend has",
            fix="export with --precision fp32, or name another backend",
        )
    return ArtifactRefused(
        f"{name}: {first}", expected="a graph this ONNX Runtime can run", fix="export the bundle again"
    )
