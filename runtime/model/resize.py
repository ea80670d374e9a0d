"""Area and bicubic resizing as products with small matrices."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

CUBIC_A = -0.75


@lru_cache(maxsize=4096)
def area_matrix(inputs: int, outputs: int) -> NDArray[np.float32]:
    """Adaptive average pooling (m outputs, n inputs): output i averages inputs floor(i·n/m) … ceil((i+1)·n/m) − 1."""
    matrix = np.zeros((outputs, inputs), np.float64)
    for i in range(outputs):
        start, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:end] = 1 / (end - start)
    return _frozen(matrix)


@lru_cache(maxsize=4096)
def bicubic_matrix(inputs: int, outputs: int) -> NDArray[np.float32]:
    """Cubic convolution (outputs, inputs): a = −0.75, half-pixel centres, edges repeated, no antialias."""
    matrix = np.zeros((outputs, inputs), np.float64)
    for i in range(outputs):
        centre = (i + 0.5) * inputs / outputs - 0.5
        first = int(np.floor(centre))
        for tap in range(first - 1, first + 3):
            matrix[i, min(max(tap, 0), inputs - 1)] += _cubic(abs(centre - tap))
    return _frozen(matrix)


def _cubic(x: float) -> float:
    if x <= 1:
        return ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
    if x < 2:
        return CUBIC_A * (((x - 5) * x + 8) * x - 4)
    return 0.0


def _frozen(matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    result = matrix.astype(np.float32)
    result.flags.writeable = False
    return result


def resize(
    maps_BhwD: NDArray[np.float32], rows: NDArray[np.float32], columns: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Maps (B, h, w, D) resized to (B, h', w', D) by the matrices (h', h) and (w', w).

    The products of an image have the same shapes in any batch, so its result does not depend on the batch.
    """
    B, h, w, D = maps_BhwD.shape
    tall = np.matmul(rows, maps_BhwD.reshape(B, h, w * D)).reshape(B * len(rows), w, D)
    resized: NDArray[np.float32] = np.matmul(columns, tall).reshape(B, len(rows), len(columns), D)
    return resized
