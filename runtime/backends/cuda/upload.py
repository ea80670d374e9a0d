"""Parameters in one allocation of device memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...cuda.arena import Arena
from ...cuda.array import DeviceArray
from ...cuda.device import Device
from .parameters import Parameter


def upload(device: Device, parameters: Mapping[str, Parameter]) -> dict[str, DeviceArray]:
    """Copy parameters to a device, and wait. Raises OutOfMemory."""
    arena = Arena(device, {name: (each.value.shape, each.dtype) for name, each in parameters.items()})
    kept = []
    for name, parameter in parameters.items():
        kept.append(np.ascontiguousarray(parameter.value))
        device.write(arena[name], kept[-1])
    device.synchronize()  # `kept` is freed next
    return arena.arrays
