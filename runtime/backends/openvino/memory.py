"""The memory that OpenVINO takes on a CPU, measured with version 2026.4.

Files stay mapped beside the weights that were repacked. Opening the condition graph repacks its weights, which would
cost every new class a tenth of a second, so the graph stays open.
"""

from __future__ import annotations

from dataclasses import replace

from ...memory.library import LibraryMemory
from ...model.precision import Precision

FLOAT32_ARITHMETIC = LibraryMemory(
    runtime=102 * 2**20,
    arena=1.15,
    products=2.1,
    half_products=3.1,  # the file, and float32 of twice its size; measured at the tiny size only
    convolutions=5.5,  # in several layouts at once when they are first run
    half_convolutions=11.0,
    half_step=1.35,  # with keys and values widened
    half_decoder=1.25,
    transposed_maps=(7.5, 6.5),
    keeps_condition=True,
    one_by_one=True,
)
BF16_ARITHMETIC = replace(
    FLOAT32_ARITHMETIC,
    runtime=112 * 2**20,
    arena=1.2,
    transposed_maps=(9.0, 3.0),  # for any size; less for the default size, which is compiled for its shape
    half_step=1.0,
    half_products=2.4,
    half_convolutions=2.5,
    half_decoder=0.5,  # maps of two bytes
)
"""For bfloat16 on a processor that computes in it: nothing is widened."""


def library_of(precision: Precision, bf16_arithmetic: bool) -> LibraryMemory:
    """The constants for a graph of a precision. bf16_arithmetic: whether the processor computes in bfloat16."""
    return BF16_ARITHMETIC if bf16_arithmetic and precision is Precision.BF16 else FLOAT32_ARITHMETIC
