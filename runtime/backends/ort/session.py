"""What both ONNX Runtime backends share: the probe, sessions with arrays bound by address, and error translation."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ...bundle.opening import Bundle
from ...checks import version_numbers
from ...errors import BackendUnavailable, FlexVARError, first_line
from ...files.targets import utf8_name
from ...model.tensors import GraphSpec
from ..base import Array, Arrays, Availability, BindingCheck, Bound, Graph, closed_graph
from ..failures import failure
from ..loading import load_onnxruntime

Places: TypeAlias = dict[str, tuple[int, tuple[int, ...]]]
"""The address and shape of each array, by name."""

# Before 1.24, weights are read from any path that a graph names. Before 1.25, an image depends on its batch.
MINIMUM = "1.25"
_ONNX_BFLOAT16 = 16  # ONNX element type; NumPy has no bfloat16
_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def probe_onnxruntime(extra: str, minimum: str = MINIMUM) -> Availability:
    """Whether one ONNX Runtime of version `minimum` or later can be loaded. extra: our extra that installs it."""
    wheels = _wheels()
    if len(wheels) > 1:
        names = " and ".join(wheels)
        return Availability(
            False,
            f"{names} are installed together and overwrite each other's files",
            f"pip uninstall -y {' '.join(wheels)} && pip install 'flexvar-deploy[{extra}]'",
        )
    wheel = next(iter(wheels), None)
    try:
        version = str(load_onnxruntime().__version__)
    except Exception as error:  # a damaged wheel can raise any error
        if wheel is None:
            return Availability(False, "onnxruntime is not installed", f"pip install 'flexvar-deploy[{extra}]'")
        detail = f"{wheel} cannot be loaded ({first_line(error)})"
        return Availability(False, detail, f"pip install --force-reinstall {wheel}")
    name = wheel or "onnxruntime"
    if version_numbers(version) < version_numbers(minimum):
        return Availability(False, f"{name} {version} is older than {minimum}", f"pip install '{name}>={minimum}'")
    return Availability(True, f"{name} {version}")


def _wheels() -> list[str]:
    """The wheels in the folder from which Python imports onnxruntime. Wheels in later folders do no harm."""
    folders: dict[str, list[str]] = {}
    for name in _WHEELS:
        with suppress(importlib.metadata.PackageNotFoundError):
            folder = os.path.realpath(str(importlib.metadata.distribution(name).locate_file("")))
            folders.setdefault(folder, []).append(name)
    for folder in map(os.path.realpath, sys.path):
        if folder in folders:
            return folders[folder]
    return [name for names in folders.values() for name in names]


def open_session(bundle: Bundle, graph: str, options: Any, provider: tuple[str, dict[str, str]]) -> Any:
    """A session of ONNX Runtime. Raises ArtifactRefused, EnvironmentFailed, OutOfMemory."""
    ort, path = load_onnxruntime(), bundle.graph_file(graph)
    with bundle.unchanged(), utf8_name(path, "ONNX Runtime") as name, ort_errors(path.name):
        # without enable_fallback=0 it tries the CPU and prints that to standard output
        return ort.InferenceSession(name, options, providers=[provider], enable_fallback=0)


@dataclass
class _Reused:
    """A binding that the runs of a graph share. It does not keep arrays, because every run passes all of them."""

    binding: Any
    outputs: set[str]
    bound: Places = field(default_factory=dict)


class OrtGraph(Graph):
    """A graph in one session. Arrays are bound by address: inputs are read and outputs written without a copy."""

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
        """name: the file's name, for messages. opener: opens a session. place: ONNX Runtime's device type and number.
        address: returns the address of an array. run_options: ONNX Runtime's RunOptions."""
        self.spec, self.name = spec, name
        self._place, self._address, self._run_options = place, address, run_options
        self._opener = opener
        self._closed = False
        self._session: Any = opener()
        self._reused: _Reused | None = None
        self._check = BindingCheck(spec)
        tensors = (*spec.inputs, *spec.outputs)
        self._types = {t.name: _ONNX_BFLOAT16 if t.dtype == "bfloat16" else np.dtype(t.dtype) for t in tensors}

    @property
    def session(self) -> Any:
        """ONNX Runtime's session. Raises InvalidInput if the graph is closed."""
        if self._closed:
            raise closed_graph(self.name)
        if self._session is None:
            self._session = self._opener()
        return self._session

    def free_session(self) -> None:
        """Free the session. The next use opens a new one. It must not be running."""
        self._session = self._reused = None

    def bind(self, inputs: Arrays, outputs: Arrays) -> Bound:
        return OrtBound(self, self.binding(inputs, outputs), (inputs, outputs))

    def binding(self, inputs: Arrays, outputs: Arrays) -> Any:
        """ONNX Runtime's binding of these arrays to the session. It does not keep the arrays."""
        binding = self._new_binding()
        self._bind(binding, inputs, outputs, {})
        return binding

    def _new_binding(self) -> Any:
        session = self.session
        with ort_errors(self.name):
            return session.io_binding()

    def run(self, inputs: Arrays, outputs: Arrays) -> None:
        """See `Graph.run`. A step has a hundred inputs. Only those whose address or shape changed are bound again."""
        reused, self._reused = self._reused, None  # a binding that failed halfway is not reused
        if reused is None or reused.outputs != outputs.keys():
            reused = _Reused(self._new_binding(), set(outputs))
        self._bind(reused.binding, inputs, outputs, reused.bound)
        self.run_binding(reused.binding)
        self._reused = reused

    def _bind(self, binding: Any, inputs: Arrays, outputs: Arrays, bound: Places) -> None:
        """Bind arrays. bound: what is bound already; updated."""
        self._check(inputs, outputs)
        with ort_errors(self.name):
            for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, array in arrays.items():
                    place = self._address(array), array.shape
                    if bound.get(name) != place:
                        bind(name, *self._place, self._types[name], place[1], place[0])
                        bound[name] = place

    def run_binding(self, binding: Any, run_options: Any = None) -> None:
        """Run the session. run_options replaces those of the graph."""
        session = self.session
        with ort_errors(self.name):
            session.run_with_iobinding(binding, self._run_options if run_options is None else run_options)

    def close(self) -> None:
        self.free_session()
        self._closed = True


class OrtBound:
    """A binding of ONNX Runtime. It keeps the arrays, because ONNX Runtime keeps only their addresses."""

    def __init__(self, graph: OrtGraph, binding: Any, arrays: object) -> None:
        self._graph, self._binding, self._arrays = graph, binding, arrays

    def run(self) -> None:
        self._graph.run_binding(self._binding)

    def close(self) -> None:
        self._binding = self._arrays = None


@contextmanager
def ort_errors(name: str) -> Iterator[None]:
    """Raise ONNX Runtime's errors as errors of this package. name: of the graph."""
    try:
        yield
    except FlexVARError:
        raise
    except Exception as error:
        text, reason = str(error), first_line(error)
        if "NOT_IMPLEMENTED" in text or "NotImplemented" in type(error).__name__:
            raise BackendUnavailable(
                f"ONNX Runtime has no kernel for an operator of {name}: {reason}.",
                expected="operators that this backend has",
                fix="Export the bundle with --precision fp32, or name another backend.",
            ) from error
        raise failure("ONNX Runtime", name, error, reason) from error
