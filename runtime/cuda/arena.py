"""Many arrays in one allocation of device memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .array import DeviceArray, aligned
from .device import Device

Fields: TypeAlias = Mapping[str, tuple[tuple[int, ...], str]]
"""The shape and dtype of each array, by name."""


class Arena:
    """Named arrays in one allocation of device memory, each aligned.

    arrays: the arrays. whole: all bytes as one array. pinned: also make page-locked arrays of the same shapes on the
    host, as `host` and `host_whole`.
    """

    def __init__(self, device: Device, fields: Fields, *, pinned: bool = False) -> None:
        self.nbytes = nbytes(fields)
        memory = device.allocate(self.nbytes)
        self.whole = DeviceArray(memory.address, (self.nbytes,), "uint8", memory)
        self.host_whole = device.pinned(self.nbytes) if pinned else np.empty(0, np.uint8)
        self.arrays: dict[str, DeviceArray] = {}
        self.host: dict[str, NDArray[Any]] = {}
        start = 0
        for name, (shape, dtype) in fields.items():
            array = self.arrays[name] = DeviceArray(memory.address + start, shape, dtype, memory)
            if pinned:
                self.host[name] = self.host_whole[start : start + array.nbytes].view(dtype).reshape(shape)
            start += aligned(array.nbytes)

    def __getitem__(self, name: str) -> DeviceArray:
        return self.arrays[name]


def nbytes(fields: Fields) -> int:
    """The size of an arena of these fields in bytes."""
    return sum(aligned(DeviceArray(0, shape, dtype, None).nbytes) for shape, dtype in fields.values())
