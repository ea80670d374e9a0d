"""A machine with an emulated GPU, on which the backend `cuda` runs with stand-ins for cuBLASLt and cuDNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fake_cublaslt import FakeCublasLt
from fake_cudnn import FakeCudnn
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_runtime import Bundle, FlexVARPipeline
from flexvar_runtime.backends.cuda.backend import Cuda


@dataclass
class CudaMachine:
    """A bundle, a device and the libraries."""

    bundle: Bundle
    device: FakeDevice
    cublaslt: FakeCublasLt
    cudnn: FakeCudnn

    def backend(self) -> Cuda:
        return Cuda(self.device, self.cublaslt, self.cudnn)

    def open(self, shapes_kept: int | None = None) -> FlexVARPipeline:
        return FlexVARPipeline(self.bundle, self.backend(), shapes_kept)


def make_machine(path: Path, kernels: Callable[..., HostKernels], **options: Any) -> CudaMachine:
    """kernels: (kernel set, block) -> HostKernels. options: of FakeCudnn."""
    device = FakeDevice(partial(kernels, block=64))
    device.activate()
    return CudaMachine(Bundle.open(path), device, FakeCublasLt(device), FakeCudnn(device, **options))
