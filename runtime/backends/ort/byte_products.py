"""Exact 8-bit integer products in ONNX Runtime, on processors with and without VNNI.

An x86 processor without VNNI adds pairs of products of unsigned and signed bytes in 16 bits, and the sums saturate.
ONNX Runtime has an option to multiply unsigned bytes only, which is exact everywhere. With VNNI the option costs more
than half of the speed (`benchmarks/LOG.md`). ONNX Runtime does not say which processor it runs on, so a small product
shows whether sums saturate.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ...checks import version_numbers
from ...errors import BackendUnavailable
from ..base import Availability
from .session import ort_errors

MINIMUM = "1.31"  # with the option, older versions read beyond the inputs of a product with fewer than four rows
LARGEST = 255, 127
# An ONNX file with one MatMulInteger (a: 2x64 uint8, b: 64x16 int8 -> c: 2x16 int32). A test builds it again.
PRODUCT = bytes.fromhex(
    "08053a5b0a180a01610a0162120163220d4d61744d756c496e746567657212005a130a0161120e0a0c080212080a0208020a0208405a130a01"
    "62120e0a0c080312080a0208400a02081062130a0163120e0a0c080612080a0208020a02081042040a00100a"
)


def make_exact(ort: Any, options: Any) -> None:
    """Set the session options that make byte products exact on this processor. ort: the onnxruntime module.

    Raises BackendUnavailable if this version of ONNX Runtime cannot multiply bytes exactly here.
    """
    state = exact_here(ort)
    if not state.available:
        got, expected = f"{state.detail}.", "an onnxruntime that multiplies bytes exactly"
        raise BackendUnavailable(got, expected=expected, fix=state.advice)
    if saturates(ort):
        options.add_session_config_entry("session.x64quantprecision", "1")


def exact_here(ort: Any) -> Availability:
    """Whether the onnxruntime module `ort` multiplies bytes exactly on this processor, perhaps with the option."""
    if not saturates(ort) or version_numbers(ort.__version__) >= version_numbers(MINIMUM):
        return Availability(True, "exact products of bytes")
    detail = f"onnxruntime {ort.__version__} cannot multiply bytes exactly on this processor ({MINIMUM} and later can)"
    return Availability(False, detail, f"pip install 'onnxruntime>={MINIMUM}'")


@cache
def saturates(ort: Any) -> bool:
    """Whether the product of the largest bytes is too small. Takes 4 ms, once per process."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    with ort_errors("a product of bytes"):
        session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    a, b = np.full((2, 64), LARGEST[0], np.uint8), np.full((64, 16), LARGEST[1], np.int8)
    (product,) = session.run(None, {"a": a, "b": b})
    return bool((product != 64 * LARGEST[0] * LARGEST[1]).any())
