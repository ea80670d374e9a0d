"""The machine of a benchmark: what it is, and what it does at best."""

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
    """Measured with nothing else running: the faster of NumPy's and torch's matrix products, where torch is there.

    In bfloat16 by torch alone; where the processor has no such arithmetic it is computed in float32, whose rate counts.
    """
    rates = {"fp32": measured_flops_per_second(CEILING_SECONDS)}
    with contextlib.suppress(ImportError):
        rates["fp32"] = max(rates["fp32"], _torch_flops_per_second(threads, "float32"))
        rates["bf16"] = rates["fp32"]
        if _torch_flops_per_second(threads, "bfloat16", 256) > rates["fp32"] / 4:  # else a large one may take minutes
            rates["bf16"] = max(rates["fp32"], _torch_flops_per_second(threads, "bfloat16"))
    return Ceiling(copy_bytes_per_second=measured_copy_bytes_per_second(CEILING_SECONDS), flops_per_second=rates)


def best(one: Ceiling, other: Ceiling) -> Ceiling:
    """The higher of two measurements of the same machine."""
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
    """Versions of those that are there."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of the checkout this file lies in; marked where files differ from it."""
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
