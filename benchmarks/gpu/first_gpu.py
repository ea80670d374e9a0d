"""The GPU that our kernels are checked on. A rehearsal puts the emulated device in its place."""

from __future__ import annotations

from flexvar_runtime.cuda.device import Device
from flexvar_runtime.cuda.gpu import CudaDevice, find_gpu


def start_gpu() -> Device:
    """The first GPU, active. Raises BackendUnavailable."""
    device = CudaDevice(find_gpu())
    device.activate()
    return device
