"""A phase of a rehearsal: `child`, with the tests' emulated device in place of the first GPU.

The emulated device compiles our kernels with the C compiler and runs what is enqueued when somebody waits for it. It
says nothing of times, of CUDA libraries or of a driver.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from flexvar_runtime.cuda import gpu
from flexvar_runtime.errors import EnvironmentFailed

from . import child

FAKES = Path(__file__).resolve().parents[2] / "tests" / "runtime" / "cuda"
COMMAND = (sys.executable, "-m", "flexvar_bench.gpu.emulated")
BLOCK = 64  # threads of a block of the sampling kernel: fewer are faster on a processor


def install(folder: Path) -> None:
    """Whoever imports `CudaDevice` and `find_gpu` after this gets the emulated device. folder: for its kernels."""
    if not FAKES.is_dir():
        raise EnvironmentFailed("no tests beside benchmarks/", expected="a checkout", fix="rehearse in a clone")
    sys.path.insert(0, str(FAKES))
    fakes, host_kernels = importlib.import_module("fakes"), importlib.import_module("host_kernels")

    class EmulatedDevice(fakes.FakeDevice):  # type: ignore[misc, name-defined]
        def __init__(self, facts: gpu.GpuFacts) -> None:
            super().__init__(lambda config: host_kernels.HostKernels(config, folder, block=BLOCK), name=facts.name)

    def find_gpu(device: str | None = None) -> gpu.GpuFacts:
        return gpu.GpuFacts(0, "emulated GPU", "8.6", 2**32)

    replaced: Any = gpu
    replaced.CudaDevice, replaced.find_gpu = EmulatedDevice, find_gpu


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        install(Path(folder))
        return child.main()


if __name__ == "__main__":
    sys.exit(main())
