"""Many arrays in one allocation of device memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

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
        arrays, end = {}, 0
        for name, (shape, dtype) in fields.items():
            arrays[name] = DeviceArray(end, shape, dtype, None)
            end += aligned(arrays[name].nbytes)
        memory = device.allocate(end)
        self.nbytes = end
        self.arrays = {
            name: DeviceArray(memory.address + array.address, array.shape, array.dtype, memory)
            for name, array in arrays.items()
        }
        self.whole = DeviceArray(memory.address, (end,), "uint8", memory)
        self.host_whole = device.pinned(end) if pinned else np.empty(0, np.uint8)
        self.host = {
            name: self.host_whole[array.address : array.address + array.nbytes].view(array.dtype).reshape(array.shape)
            for name, array in (arrays.items() if pinned else ())
        }

    def __getitem__(self, name: str) -> DeviceArray:
        return self.arrays[name]


def nbytes(fields: Fields) -> int:
    """The size of an arena of these fields in bytes."""
    return sum(aligned(DeviceArray(0, shape, dtype, None).nbytes) for shape, dtype in fields.values())
