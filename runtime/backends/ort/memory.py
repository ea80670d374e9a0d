"""The memory that ONNX Runtime takes on a CPU, measured with version 1.31.

Its arena doubles when it grows, and never shrinks. The second run of a shape allocates the memory of all live tensors
once more, in one block. ONNX Runtime has no CPU kernels for half precision, so it widens such weights to float32.
"""

from __future__ import annotations

from ...memory.library import LibraryMemory

ORT = LibraryMemory(
    runtime=48 * 2**20,  # measured 38; versions differ
    arena=1.45,
    products=1.0,
    half_products=2.0,
    convolutions=1.4,  # weights in a blocked layout, and copies that stay on the heap
    half_convolutions=4.5,  # as float16, as float32, and in a blocked layout
    half_step=1.0,
    half_decoder=1.25,  # casts to float32 around every normalisation
    transposed_maps=(7.5, 6.5),
)
