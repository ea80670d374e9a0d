"""ONNX Runtime for the transformer and OpenVINO for the tokenizer: each for what it is the faster at, on the CPU.

For bundles whose transformer has products of bytes, which ONNX Runtime multiplies as such, and whose tokenizer computes
in bfloat16, which it has no kernels for.
"""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..graphs import DECODE, ENCODE
from . import openvino, ort_cpu
from .base import Availability, Graph, runs_precision
from .host import HostBackend, check_options

PRECISIONS = frozenset({"int8-bf16"})


def probe(name: str) -> Availability:
    states = [module.probe(name) for module in (ort_cpu, openvino)]
    missing = next((state for state in states if not state.available), None)
    return missing or Availability(True, "; ".join(state.detail for state in states))


def ready(name: str, bundle: Bundle, *, device: str | None, engines: Path | None) -> Availability:
    state = runs_precision(name, bundle.manifest.precision, PRECISIONS)
    return ort_cpu.exact_products(state, bundle.manifest.precision)


def create(name: str, *, device: str | None, threads: int | None, engines: Path | None = None) -> OrtOpenVino:
    return OrtOpenVino(check_options(name, device, threads, engines))


class OrtOpenVino(HostBackend):
    """Backend on `threads` threads, of one library at a time."""

    name = "ort-openvino"
    precisions = PRECISIONS
    maps_weights = True  # of the condition, which is ONNX Runtime's

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._transformer, self._tokenizer = ort_cpu.OrtCpu(threads), openvino.OpenVino(threads)
        self.bf16_arithmetic = self._tokenizer.bf16_arithmetic

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        library = self._tokenizer if graph in (DECODE, ENCODE) else self._transformer
        return library.open(bundle, graph, once=once)
