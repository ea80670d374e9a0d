"""The memory that OpenVINO takes on a CPU, measured with version 2026.4.

Weight files stay mapped beside the repacked weights. Opening the condition graph repacks its weights, which takes a
tenth of a second. So the graph stays open, and a new class does not pay for that.
"""

from __future__ import annotations

from dataclasses import replace

from ...memory.library import LibraryMemory
from ...model.precision import Precision

FLOAT32_ARITHMETIC = LibraryMemory(
    runtime=94 * 2**20,
    arena=1.05,
    products=2.1,
    half_products=3.1,  # the file and its float32 copy of twice the size; measured for the tiny model only
    convolutions=5.5,  # at the first run they exist in several layouts at once
    half_convolutions=11.0,
    half_step=1.35,  # keys and values are widened to float32
    half_decoder=1.25,
    transposed_maps=(7.5, 6.5),
    keeps_condition=True,
    one_by_one=True,
)
BF16_ARITHMETIC = replace(
    FLOAT32_ARITHMETIC,
    runtime=107 * 2**20,
    arena=1.1,
    transposed_maps=(9.0, 3.0),  # any size; the default size, compiled for its shape, takes less
    half_step=1.0,
    half_products=2.4,
    half_convolutions=2.5,
    half_decoder=0.5,  # maps of two bytes
)
"""For bfloat16 bundles on a processor that computes in bfloat16. Nothing is widened to float32."""


def library_of(precision: Precision, bf16_arithmetic: bool) -> LibraryMemory:
    """The constants for a graph of a precision. bf16_arithmetic: whether the processor computes in bfloat16."""
    return BF16_ARITHMETIC if bf16_arithmetic and precision is Precision.BF16 else FLOAT32_ARITHMETIC
