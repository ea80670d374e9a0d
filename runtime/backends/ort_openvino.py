"""ONNX Runtime for the transformer and OpenVINO for the tokenizer, on the CPU.

It runs int8-bf16 bundles. ONNX Runtime multiplies 8-bit integers, and OpenVINO computes in bfloat16, for which ONNX
Runtime has no kernels.
"""

from __future__ import annotations

from pathlib import Path

from ..bundle.opening import Bundle
from ..memory.library import LibraryMemory
from ..model.precision import TOKENIZER_GRAPHS, Precision
from .base import Availability, Graph
from .host_arrays import HostBackend, check_options
from .openvino import backend as openvino
from .ort import cpu as ort_cpu

PRECISIONS = frozenset({Precision.INT8_BF16})


def probe(name: str) -> Availability:
    states = [module.probe(name) for module in (ort_cpu, openvino)]
    missing = next((state for state in states if not state.available), None)
    return missing or Availability(True, "; ".join(state.detail for state in states))


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    return ort_cpu.runs_exactly(name, bundle.manifest.precision, PRECISIONS)


def libraries(precision: Precision) -> dict[str, LibraryMemory]:
    tokenizer = openvino.libraries(precision)
    return {**ort_cpu.libraries(precision), **{graph: tokenizer[graph] for graph in TOKENIZER_GRAPHS}}


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None = None) -> OrtOpenVino:
    return OrtOpenVino(check_options(name, device, threads, engines))


class OrtOpenVino(HostBackend):
    """The backend ort-openvino on `threads` threads. Only one of the two libraries runs at a time."""

    name = "ort-openvino"
    precisions = PRECISIONS
    maps_weights = True  # holds for the condition graph, which ONNX Runtime runs

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._transformer, self._tokenizer = ort_cpu.OrtCpu(threads), openvino.OpenVino(threads)

    def libraries(self, precision: Precision) -> dict[str, LibraryMemory]:
        return libraries(precision)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        library = self._tokenizer if graph in TOKENIZER_GRAPHS else self._transformer
        return library.open(bundle, graph, once=once)
