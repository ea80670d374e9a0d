"""Arrays in device memory as values: address, shape and dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..model.tensors import host_dtype

FLOAT32, HALVES = "float32", ("float16", "bfloat16")  # dtypes
ALIGNMENT = 256  # bytes; TensorRT needs it of every address


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array at `address`. `memory` owns the bytes, and lives as long as any array that uses it.

    `array[i]`, `array[i:j]` (first axis) and `reshape` are views.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    memory: Any

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * host_dtype(self.dtype).itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> DeviceArray:
        row = math.prod(self.shape[1:]) * host_dtype(self.dtype).itemsize
        if isinstance(key, slice):
            start, stop, step = key.indices(self.shape[0])
            if step != 1:
                raise IndexError(f"a slice has step {step}, but only step 1 gives a view")
            stop = max(start, stop)
            return replace(self, address=self.address + start * row, shape=(stop - start, *self.shape[1:]))
        index = key + self.shape[0] if key < 0 else key
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"index {key} is out of range: the first axis has size {self.shape[0]}")
        return replace(self, address=self.address + index * row, shape=self.shape[1:])

    def reshape(self, *shape: int) -> DeviceArray:
        if math.prod(shape) != self.size:
            raise ValueError(f"an array of shape {self.shape} cannot have shape {shape}")
        return replace(self, shape=shape)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
