"""Runs one phase of a rehearsal, as `child` does, with the tests' emulated device in place of the first GPU.

The emulated device compiles our kernels with the C compiler. It runs queued work at the next synchronisation. Its times
mean nothing, and it tests neither CUDA libraries nor a driver.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexvar_runtime.cuda.device import Replay
from flexvar_runtime.errors import EnvironmentFailed

from . import child, first_gpu

FAKES = Path(__file__).resolve().parents[2] / "tests" / "runtime" / "cuda"
COMMAND = (sys.executable, "-m", "flexvar_bench.gpu.emulated")
BLOCK = 64  # threads of a block of the sampling kernel: fewer are faster on a processor


def emulated_gpu(folder: Path) -> Callable[[], Any]:
    """A function that starts an emulated device, which counts its captures. folder: for the compiled kernels."""
    if not FAKES.is_dir():
        raise EnvironmentFailed(
            f"The folder {FAKES} is missing.",
            expected="a checkout with its tests",
            fix="Run the rehearsal in a git clone.",
        )
    sys.path.insert(0, str(FAKES))
    fakes, host_kernels = importlib.import_module("fakes"), importlib.import_module("host_kernels")

    class EmulatedGpu(fakes.FakeDevice):  # type: ignore[misc, name-defined]
        captures = 0

        def capture(self, enqueue: Callable[[], None]) -> Replay:
            self.captures += 1
            replay: Replay = super().capture(enqueue)
            return replay

    def start() -> EmulatedGpu:
        device = EmulatedGpu(lambda config: host_kernels.HostKernels(config, folder, block=BLOCK))
        device.activate()
        return device

    return start


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        start = emulated_gpu(Path(folder))
        first_gpu.start_gpu = start
        if sys.argv[1:2] == ["proof"]:  # this job starts its own device, which counts captures
            proof: Any = importlib.import_module(".torch_proof", __package__)
            proof.start_device = start
        return child.main()


if __name__ == "__main__":
    sys.exit(main())
