"""The memory that ONNX Runtime takes on a CPU, measured with version 1.31.

Its arena grows by doubling and gives nothing back. A second run of a shape takes what is alive once more, in one piece.
It has no kernels for half precision, so it widens such weights to float32.
"""

from __future__ import annotations

from ...memory.library import LibraryMemory

ORT = LibraryMemory(
    runtime=50 * 2**20,  # 40 here, versions differ
    arena=1.45,
    products=1.0,
    half_products=2.0,
    convolutions=1.4,  # weights reordered into blocks, and copies that stay in the heap
    half_convolutions=4.5,  # read as float16, widened to float32, reordered
    half_step=1.0,
    half_decoder=1.25,  # casts to float32 around every normalisation
    transposed_maps=(7.5, 6.5),
)
