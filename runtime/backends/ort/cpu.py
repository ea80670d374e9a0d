"""ONNX Runtime on the CPU, the default backend. It works everywhere.

It reads inputs and writes outputs in place, without a copy, and maps weight files into memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ...bundle.opening import Bundle
from ...machine.processors import default_threads
from ...machine.threads import require_threads
from ...memory.library import LibraryMemory
from ...model.precision import Precision
from ...model.signatures import GRAPHS, STEP
from ..base import Availability, runs_precision
from ..host_arrays import HostBackend, check_options, require_contiguous
from ..loading import load_onnxruntime
from .byte_products import exact_here, make_exact
from .memory import ORT
from .session import OrtGraph, open_session, probe_onnxruntime

PRECISIONS = frozenset({Precision.FP32, Precision.FP16, Precision.INT8})


def probe(name: str) -> Availability:
    state = probe_onnxruntime("cpu")
    return replace(state, detail=f"{state.detail}, {default_threads()} threads") if state.available else state


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    return runs_exactly(name, bundle.manifest.precision, PRECISIONS)


def libraries(precision: Precision) -> dict[str, LibraryMemory]:
    return dict.fromkeys(GRAPHS, ORT)


def runs_exactly(name: str, precision: Precision, precisions: frozenset[Precision]) -> Availability:
    """Like `runs_precision`. A bundle with byte products also needs that they are exact on this processor."""
    state = runs_precision(name, precision, precisions)
    if not state.available or precision.of(STEP) is not Precision.INT8:
        return state
    exact = exact_here(load_onnxruntime())
    return state if exact.available else exact


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None = None) -> OrtCpu:
    return OrtCpu(check_options(name, device, threads, engines))


class OrtCpu(HostBackend):
    """The backend ort-cpu on `threads` threads."""

    name = "ort-cpu"
    precisions = PRECISIONS
    maps_weights = True

    def libraries(self, precision: Precision) -> dict[str, LibraryMemory]:
        return libraries(precision)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        """Open a session. With `once` the weights are not repacked: they stay in the mapped file until `close`."""
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 4  # FATAL only: errors are raised
        options.add_session_config_entry("session.prepack.enable_parallel", "1")  # halves the time to open
        # threads would spin for 45 ms after a run
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if bundle.manifest.precision.of(graph) is Precision.INT8:
            make_exact(ort, options)
        if once:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        spec = bundle.graph(graph)
        require_threads(self.threads - 1)  # each session starts its own; the caller's thread is one of them
        return OrtGraph(
            spec.file,
            spec,
            opener=lambda: open_session(bundle, graph, options, ("CPUExecutionProvider", {})),
            place=("cpu", 0),
            address=_address,
        )


def _address(array: NDArray[Any]) -> int:
    return int(require_contiguous(array).__array_interface__["data"][0])
