"""Facts of the machine of a run, and its measured copy and matrix-product rates, which limit every generation."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexvar_runtime import __version__
from flexvar_runtime.backends import probe

from ..machine import installed
from .tools import found_tools

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "tensorrt",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13-bindings",
    "nvmath-python",
    "nvidia-cudnn-frontend",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)
SMI_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "compute_cap",
    "compute_mode",
    "mig.mode.current",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "power.limit",
)
COPY_BYTES = 4 * 2**30
GEMM_SIDE = 8192
REPEATS = 10


def uses_gpu() -> bool:
    return torch.cuda.is_available()


def used_bytes() -> Callable[[], int] | None:
    """A function that returns the bytes in use on the GPU, by all processes. None without a GPU."""
    if not uses_gpu():
        return None

    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    return used


def device_seconds(work: Callable[[], object]) -> float:
    """Seconds of one call, between two events on torch's stream. Without a GPU: by the clock of the host."""
    if not uses_gpu():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def machine(save: Callable[[dict[str, Any]], None], tiny: bool) -> None:
    """Save the facts of the machine first, then its rates. Without a GPU the rates are "not measured"."""
    result: dict[str, Any] = {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "nvidia_smi": nvidia_smi(),
        "tools": found_tools(),
        "versions": {"flexvar-deploy": __version__} | installed(DISTRIBUTIONS),
        "torch": {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "gpu": torch.cuda.get_device_name() if uses_gpu() else None,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())) if uses_gpu() else None,
        },
    }
    save(result)
    nbytes, side = (64 * 2**20, 1024) if tiny else (COPY_BYTES, GEMM_SIDE)
    if uses_gpu():
        result["rates"] = {
            "copy_bytes_per_second": copy_rate(nbytes),
            "copy_how": f"torch copy of {nbytes} bytes, read and written counted, median of {REPEATS}",
            "gemm_flops_per_second": gemm_rate(side),
            "gemm_how": f"torch bf16 product of side {side} on random data, median of {REPEATS}",
        }
    else:
        result["rates"] = {"reason": "not measured: torch sees no GPU"}
    save(result)


def nvidia_smi() -> dict[str, str]:
    """The first GPU as nvidia-smi describes it, or the reason why it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"reason": str(error)}
    lines = done.stdout.strip().splitlines() or [""]
    values = [value.strip() for value in lines[0].split(",")]
    return dict(zip(SMI_FIELDS, values, strict=False)) | {"gpus": str(len(lines))}


def onnxruntime_facts() -> dict[str, Any]:
    """Version, folder and providers of the imported onnxruntime, which need not be the installed one."""
    try:
        ort = importlib.import_module("onnxruntime")
        return {
            "version": str(ort.__version__),
            "providers": list(ort.get_available_providers()),
            "folder": Path(str(ort.__file__)).parent.parent.name,
        }
    except Exception as error:  # a broken wheel fails in any way
        return {"reason": str(error) or type(error).__name__}


def probe_backend(name: str) -> dict[str, Any]:
    """Whether a backend works here, and otherwise why not. Loads its libraries, so call it in a separate process."""
    start = time.perf_counter()
    found: dict[str, Any] = asdict(probe(name)) | {"seconds": time.perf_counter() - start}
    if name.startswith("ort"):
        found["onnxruntime"] = onnxruntime_facts()
    return found


def copy_rate(nbytes: int) -> float:
    """Bytes per second of a copy on the GPU, read and written bytes counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * nbytes / _median(lambda: target.copy_(source))


def gemm_rate(side: int) -> float:
    """Floating-point operations per second of a bfloat16 matrix product on the GPU."""
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _median(lambda: torch.mm(a, b, out=out))


def _median(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    times = sorted(device_seconds(work) for _ in range(REPEATS))
    return times[len(times) // 2]
