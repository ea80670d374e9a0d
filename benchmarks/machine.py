"""The machine of a benchmark: its facts, and its measured limits."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from flexvar_runtime.errors import BackendUnavailable

from .limits import measured_copy_bytes_per_second, measured_flops_per_second
from .records import Ceiling, Environment

DISTRIBUTIONS = ("flexvar-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch")
CEILING_SECONDS = 1.5


def environment(threads: int) -> Environment:
    return Environment(
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=_gpu(),
        python=platform.python_version(),
        versions=installed(DISTRIBUTIONS),
        commit=_commit(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def ceiling(threads: int) -> Ceiling:
    """Measure the limits of the machine, while nothing else runs.

    The rate in float32 is the faster of NumPy's and torch's matrix products. The rate in bfloat16 is torch's. If the
    processor has no bfloat16 arithmetic, it computes in float32, and the float32 rate counts.
    """
    rates = {"fp32": measured_flops_per_second(CEILING_SECONDS)}
    with contextlib.suppress(ImportError):
        rates["fp32"] = max(rates["fp32"], _torch_flops_per_second(threads, "float32"))
        rates["bf16"] = rates["fp32"]
        if (
            _torch_flops_per_second(threads, "bfloat16", 256) > rates["fp32"] / 4
        ):  # otherwise a large product may take minutes
            rates["bf16"] = max(rates["fp32"], _torch_flops_per_second(threads, "bfloat16"))
    return Ceiling(copy_bytes_per_second=measured_copy_bytes_per_second(CEILING_SECONDS), flops_per_second=rates)


def best(one: Ceiling, other: Ceiling) -> Ceiling:
    """The higher rates of two measurements of one machine."""
    kinds = one.flops_per_second.keys() | other.flops_per_second.keys()
    return Ceiling(
        copy_bytes_per_second=max(one.copy_bytes_per_second, other.copy_bytes_per_second),
        flops_per_second={
            kind: max(one.flops_per_second.get(kind, 0.0), other.flops_per_second.get(kind, 0.0))
            for kind in sorted(kinds)
        },
    )


def _torch_flops_per_second(threads: int, dtype: str, side: int = 2048) -> float:
    import torch

    torch.set_num_threads(threads)
    a, best = torch.randn(side, side, dtype=getattr(torch, dtype)), 0.0
    end = time.perf_counter() + CEILING_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    from flexvar_runtime.cuda.gpu import find_gpu

    try:
        return find_gpu().name
    except BackendUnavailable:
        return None


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of the distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout of this file, with "-dirty" if files were changed. None outside a checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
