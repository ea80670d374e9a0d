"""Runs one phase of a rehearsal, as `child` does, with the tests' emulated device in place of the first GPU.

The emulated device compiles our kernels with the C compiler. It runs queued work at the next synchronisation. On the
backend `cuda`, fakes of the tests compute what cuBLASLt and cuDNN compute. Times mean nothing, and neither CUDA
libraries nor a driver are tested.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexvar_runtime.backends.base import Availability
from flexvar_runtime.backends.cuda import backend as cuda_backend
from flexvar_runtime.backends.cuda.backend import Cuda
from flexvar_runtime.cuda.device import Replay
from flexvar_runtime.errors import EnvironmentFailed

from . import child, first_gpu

TESTS = Path(__file__).resolve().parents[2] / "tests" / "runtime"
FAKES = (TESTS / "cuda", TESTS / "backends" / "cuda")
COMMAND = (sys.executable, "-m", "flexvar_bench.gpu.emulated")
BLOCK = 64  # threads of a block of the sampling kernel: fewer are faster on a processor


def emulated_gpu(folder: Path) -> Callable[[], Any]:
    """A function that starts an emulated device, which counts its captures. folder: for the compiled kernels."""
    for fake in FAKES:
        if not fake.is_dir():
            raise EnvironmentFailed(
                f"The folder {fake} is missing.",
                expected="a checkout with its tests",
                fix="Run the rehearsal in a git clone.",
            )
        sys.path.insert(0, str(fake))
    fakes, host_kernels = importlib.import_module("fakes"), importlib.import_module("host_kernels")
    numbers = itertools.count()  # a loaded library must not be overwritten, so each set of kernels has its own folder

    class EmulatedGpu(fakes.FakeDevice):  # type: ignore[misc, name-defined]
        captures = 0

        def capture(self, enqueue: Callable[[], None]) -> Replay:
            self.captures += 1
            replay: Replay = super().capture(enqueue)
            return replay

    def start() -> EmulatedGpu:
        def compile_kernels(config: Any) -> Any:
            return host_kernels.HostKernels(config, folder / str(next(numbers)), block=BLOCK)

        device = EmulatedGpu(compile_kernels)
        device.activate()
        return device

    return start


def emulate_cuda(start: Callable[[], Any]) -> None:
    """Let the backend `cuda` run on an emulated device, with fakes of its libraries. start: starts the device."""
    fake_cublaslt, fake_cudnn = importlib.import_module("fake_cublaslt"), importlib.import_module("fake_cudnn")

    def create(name: str, **_: object) -> Cuda:
        device = start()
        return Cuda(device, fake_cublaslt.FakeCublasLt(device), fake_cudnn.FakeCudnn(device))

    module: Any = cuda_backend
    module.probe = lambda name: Availability(True, "emulated")
    module.create = create


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        start = emulated_gpu(Path(folder))
        first_gpu.start_gpu = start
        emulate_cuda(start)
        if sys.argv[1:2] == ["proof"]:  # this job starts its own device, which counts captures
            proof: Any = importlib.import_module(".torch_proof", __package__)
            proof.start_device = start
        return child.main()


if __name__ == "__main__":
    sys.exit(main())
