"""Opens the GPU for checks of our kernels. A rehearsal replaces `start_gpu`, which then returns the emulated device."""

from __future__ import annotations

from flexvar_runtime.cuda.device import Device
from flexvar_runtime.cuda.gpu import CudaDevice, find_gpu


def start_gpu() -> Device:
    """The first GPU, active. Raises BackendUnavailable."""
    device = CudaDevice(find_gpu())
    device.activate()
    return device
