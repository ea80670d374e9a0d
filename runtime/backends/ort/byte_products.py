"""Products of unsigned by signed bytes in ONNX Runtime: whether this processor needs to be told to make them exact.

Without dot products of bytes (VNNI) an x86 processor multiplies them in pairs that add up in sixteen bits and saturate.
ONNX Runtime can be told to make them of unsigned by unsigned bytes instead, which is exact everywhere, but on
processors with such instructions more than half slower (`benchmarks/LOG.md`). It does not say which processor it has.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

from ...errors import BackendUnavailable
from ..base import Availability

MINIMUM = (1, 31)  # what was tested
LARGEST = 255, 127
# One MatMulInteger (a: 2x64 uint8, b: 64x16 int8 -> c: 2x16 int32) as an ONNX file, which a test makes anew.
PRODUCT = bytes.fromhex(
    "08053a5b0a180a01610a0162120163220d4d61744d756c496e746567657212005a130a0161120e0a0c080212080a0208020a0208405a130a01"
    "62120e0a0c080312080a0208400a02081062130a0163120e0a0c080612080a0208020a02081042040a00100a"
)


def make_exact(ort: Any, options: Any) -> None:
    """Set in `options`, of a session of the module `ort`, what exact products of bytes need on this processor.

    Raises BackendUnavailable where they cannot be had.
    """
    state = exact_here(ort)
    if not state.available:
        fix = state.fix or ""
        raise BackendUnavailable(state.detail, expected="one that multiplies bytes exactly", fix=fix)
    if saturates(ort):
        options.add_session_config_entry("session.x64quantprecision", "1")


def exact_here(ort: Any) -> Availability:
    """Whether the module `ort` multiplies bytes exactly on this processor, or can be told to.

    Where it would have to be told, older ones write beside the inputs of a product with fewer than four.
    """
    if not saturates(ort) or tuple(map(int, re.findall("[0-9]+", ort.__version__)[:2])) >= MINIMUM:
        return Availability(True, "exact products of bytes")
    wanted = ".".join(map(str, MINIMUM))
    detail = f"onnxruntime {ort.__version__} for int8, on a processor without products of bytes"
    return Availability(False, detail, f"pip install 'onnxruntime>={wanted}'")


@cache
def saturates(ort: Any) -> bool:
    """Whether the largest bytes multiply to less than they should: 4 ms, once a process."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    a, b = (
        np.full(shape, value, kind)
        for shape, value, kind in zip(((2, 64), (64, 16)), LARGEST, (np.uint8, np.int8), strict=True)
    )
    (product,) = session.run(None, {"a": a, "b": b})
    return bool((product != 64 * LARGEST[0] * LARGEST[1]).any())
