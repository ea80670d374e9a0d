"""Arrays in device memory, as values: where they lie, their shape and type."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..model.tensors import host_dtype

ALIGNMENT = 256  # bytes; what TensorRT asks of every address


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array at `address`. `memory` owns the bytes: they live as long as any array on them.

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
                raise IndexError(f"step {step}: only whole runs of the first axis are views")
            stop = max(start, stop)
            return replace(self, address=self.address + start * row, shape=(stop - start, *self.shape[1:]))
        index = key + self.shape[0] if key < 0 else key
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"{key} of {self.shape[0]}")
        return replace(self, address=self.address + index * row, shape=self.shape[1:])

    def reshape(self, *shape: int) -> DeviceArray:
        if math.prod(shape) != self.size:
            raise ValueError(f"{self.shape} as {shape}")
        return replace(self, shape=shape)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
