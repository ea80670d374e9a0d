"""The base of all GPU backends: arrays are in the memory of a device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle.opening import Bundle
from ..cuda.array import DeviceArray
from ..cuda.device import Device, allocate
from ..cuda.gpu import find_gpu
from ..errors import BackendUnavailable
from ..model.precision import Precision
from ..model.signatures import DEVICE_LABELS
from ..model.tensors import host_dtype
from .base import Availability, Graph


class DeviceArrays:
    """Arrays in the memory of a device."""

    def __init__(self, device: Device) -> None:
        self.device: Device = device

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        memory = allocate(self.device, math.prod(shape) * host_dtype(dtype).itemsize)
        return DeviceArray(memory.address, shape, dtype, memory)

    def upload(self, host: NDArray[Any]) -> DeviceArray:
        """A copy on the device. Waits for it, so the host array may be freed."""
        contiguous = np.ascontiguousarray(host)
        array = self.empty(contiguous.shape, str(contiguous.dtype))
        self.device.write(array, contiguous)
        self.device.synchronize()
        return array

    def download(self, array: DeviceArray) -> NDArray[Any]:
        """A copy on the host, made after all work that was enqueued before. Waits for it."""
        host = np.empty(array.shape, host_dtype(array.dtype))
        self.device.read(host, array)
        self.device.synchronize()
        return host

    def available_bytes(self) -> int | None:
        return self.device.free_bytes()

    def close(self) -> None:
        self.device.close()


class DeviceBackend(DeviceArrays, ABC):
    """A backend whose arrays are in the memory of a device.

    captures: whether its graphs can be part of a captured CUDA graph.
    """

    precisions = frozenset({Precision.FP32, Precision.FP16, Precision.BF16})
    threads = 1
    labels_per_run = DEVICE_LABELS
    captures = True

    def __init__(self, name: str, device: Device) -> None:
        super().__init__(device)
        self.name = name

    @abstractmethod
    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> Graph:
        """See `Backend.open`."""

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def free_unused(self) -> None:
        """Drop working memory that no binding uses. Called when memory runs out."""


def probe_gpu(device: str | None = None) -> Availability:
    """Whether a GPU works here: cuda.core, the driver and the device. Starts no work."""
    try:
        return Availability(True, str(find_gpu(device)))
    except BackendUnavailable as error:
        return Availability.of_error(error)
