"""What the backends on a GPU share: arrays in device memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import host_dtype
from ..engines import CONDITION_LABELS
from .array import DeviceArray
from .device import Device, allocate


class DeviceArrays:
    """Allocate, upload and download on a device; the base of its backends."""

    precisions = frozenset({"fp32", "fp16", "bf16"})
    threads = 1
    labels_per_run = CONDITION_LABELS
    captures = True
    maps_weights = False
    bf16_arithmetic = False

    def __init__(self, name: str, device: Device) -> None:
        self.name = name
        self.device: Device = device

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        memory = allocate(self.device, math.prod(shape) * host_dtype(dtype).itemsize)
        return DeviceArray(memory.address, shape, dtype, memory)

    def upload(self, host: NDArray[Any]) -> DeviceArray:
        """A copy on the device. Waits for it: the host array may go."""
        contiguous = np.ascontiguousarray(host)
        array = self.empty(contiguous.shape, str(contiguous.dtype))
        self.device.write(array, contiguous)
        self.device.synchronize()
        return array

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy on the host, of all that was enqueued before. Waits for it."""
        host = np.empty(array.shape, host_dtype(array.dtype))
        self.device.read(host, array)
        self.device.synchronize()
        return host

    def available_bytes(self) -> int | None:
        return self.device.free_bytes()
