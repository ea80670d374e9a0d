"""What both ONNX Runtime backends share: is it installed, a session whose arrays are bound by address, its errors."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArtifactRefused, BackendUnavailable, FlexVARError, InvalidInput, OutOfMemory
from ...model.tensors import GraphSpec
from ..base import Array, Availability, BindingCheck, Bound

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


def open_session(path: Path, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """A session of ONNX Runtime. Raises ArtifactRefused, BackendUnavailable, OutOfMemory."""
    ort = importlib.import_module("onnxruntime")
    try:
        return ort.InferenceSession(
            str(path),
            options,
            providers=[provider],
            enable_fallback=0,  # else it tries the CPU, and says so on standard output
        )
    except Exception as error:
        raise _translate(error, path.name) from error


@dataclass
class _Reused:
    """A binding that runs of a graph share. It holds addresses, not arrays: every run brings all of them."""

    binding: Any
    outputs: set[str]
    bound: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)


class OrtGraph:
    """One session. Arrays are bound by address: inputs are read and outputs written in place, nothing is copied."""

    most_images = None  # any number

    def __init__(
        self,
        name: str,
        spec: GraphSpec,
        *,
        opener: Callable[[], Any],
        place: tuple[str, int],
        address: Callable[[Array], int],
        run_options: Any = None,
    ) -> None:
        """name: for messages; opener: opens a session; place: device type and number as ONNX Runtime names them;
        address: where an array lies there; run_options: of ONNX Runtime."""
        self.spec, self.name = spec, name
        self._place, self._address, self._run_options = place, address, run_options
        self._opener = opener
        self._closed = False
        self._session: Any = opener()
        self._reused: _Reused | None = None
        self._check = BindingCheck(spec)
        self._types = {
            t.name: _ONNX_BFLOAT16 if t.dtype == "bfloat16" else np.dtype(t.dtype)
            for t in (*spec.inputs, *spec.outputs)
        }

    @property
    def session(self) -> Any:
        """ONNX Runtime's own session. Raises InvalidInput once the graph is closed."""
        if self._closed:
            raise InvalidInput(f"{self.name}, closed", expected="an open graph", fix="open the bundle again")
        if self._session is None:
            self._session = self._opener()
        return self._session

    def renew(self) -> None:
        """Free the session and everything it holds; the next use opens another. Nothing of it may be running."""
        self._session = self._reused = None

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        return OrtBound(self, self.binding(inputs, outputs), (inputs, outputs))

    def binding(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Any:
        """ONNX Runtime's binding of these arrays to the session. It does not keep them."""
        binding = self._new_binding()
        self._bind(binding, inputs, outputs, {})
        return binding

    def _new_binding(self) -> Any:
        session = self.session
        try:
            return session.io_binding()
        except Exception as error:
            raise _translate(error, self.name) from error

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """A step has a hundred inputs, most of them the same at every scale: only what moved is bound anew."""
        reused, self._reused = self._reused, None  # what fails half bound is not used again
        if reused is None or reused.outputs != outputs.keys():
            reused = _Reused(self._new_binding(), set(outputs))
        self._bind(reused.binding, inputs, outputs, reused.bound)
        self.run_binding(reused.binding)
        self._reused = reused

    def _bind(
        self,
        binding: Any,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        bound: dict[str, tuple[int, tuple[int, ...]]],
    ) -> None:
        """bound: address and shape of what is bound already, by name; brought up to date."""
        self._check(inputs, outputs)
        try:
            for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in arrays.items():
                    place = self._address(array), array.shape
                    if bound.get(name) != place:
                        bind(name, *self._place, self._types[name], place[1], place[0])
                        bound[name] = place
        except FlexVARError:
            raise
        except Exception as error:
            raise _translate(error, self.name) from error

    def run_binding(self, binding: Any, run_options: Any = None) -> None:
        """run_options: in place of the graph's own."""
        session = self.session
        try:
            session.run_with_iobinding(binding, self._run_options if run_options is None else run_options)
        except Exception as error:
            raise _translate(error, self.name) from error

    def close(self) -> None:
        self.renew()
        self._closed = True


class OrtBound:
    """Addresses bound to a session. It keeps the arrays, which the binding does not."""

    def __init__(self, graph: OrtGraph, binding: Any, arrays: object) -> None:
        self._graph, self._binding, self._arrays = graph, binding, arrays

    def run(self) -> None:
        self._graph.run_binding(self._binding)

    def close(self) -> None:
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
