"""Many arrays in one allocation of device memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .array import DeviceArray, aligned
from .device import Device, allocate

Fields: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]
"""The shape and dtype of each array, by name."""


class Arena:
    """Named arrays in one allocation of device memory, each aligned.

    arrays: the arrays. whole: all bytes as one array. pinned: also make page-locked arrays of the same shapes on the
    host, as `host` and `host_whole`.
    """

    def __init__(self, device: Device, fields: Fields, *, pinned: bool = False) -> None:
        self.nbytes = nbytes(fields)
        memory = allocate(device, self.nbytes)
        self.whole = DeviceArray(memory.address, (self.nbytes,), "uint8", memory)
        self.host_whole = device.pinned(self.nbytes) if pinned else np.empty(0, np.uint8)
        self.arrays = carve(self.whole, fields)
        self.host: dict[str, NDArray[Any]] = {}
        if pinned:
            for name, array in self.arrays.items():
                start = array.address - memory.address
                part = self.host_whole[start : start + array.nbytes]
                self.host[name] = part.view(array.dtype).reshape(array.shape)

    def __getitem__(self, name: str) -> DeviceArray:
        return self.arrays[name]


def nbytes(fields: Fields) -> int:
    """The size of an arena of these fields in bytes."""
    return sum(aligned(DeviceArray(0, shape, dtype, None).nbytes) for shape, dtype in fields.values())


def carve(block: DeviceArray, fields: Fields) -> dict[str, DeviceArray]:
    """Arrays of these fields in the memory of a block, each aligned. Raises ValueError if it is too small."""
    if nbytes(fields) > block.nbytes:
        raise ValueError(f"a block of {block.nbytes} bytes is too small for {nbytes(fields)}")
    arrays: dict[str, DeviceArray] = {}
    start = block.address
    for name, (shape, dtype) in fields.items():
        arrays[name] = DeviceArray(start, shape, dtype, block.memory)
        start += aligned(arrays[name].nbytes)
    return arrays
