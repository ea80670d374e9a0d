"""Profiles one generation of the runtime with torch's profiler, which records every kernel of the process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .files import Save
from .hardware import uses_gpu
from .kernel_bounds import compare_kinds, expected_works
from .kernel_classes import kernels_of, summary
from .random_models import schedule_of
from .runtime_jobs import opened

WARM_UPS = 3


def profile_runtime(work: Path, model: str, backend: str, batches: Sequence[int], save: Save) -> None:
    """Profile one generation for each batch. The profiler slows it down a little.

    On the backend `cuda`, kernels are also compared with the bounds of the time model, if it knows the GPU.
    """
    if uses_gpu():
        torch.zeros(1, device="cuda")  # the profiler needs torch to have started CUDA
    with opened(work, model, backend) as run:
        result: dict[str, Any] = run.facts | {"warmup": WARM_UPS, "decoder_included": True, "rows": []}
        for batch in batches:
            labels = list(range(min(batch, run.pipeline.model.classes))) * batch
            for _ in range(WARM_UPS):
                run.generate(labels[:batch])
            with profile(activities=[ProfilerActivity.CUDA if uses_gpu() else ProfilerActivity.CPU]) as seen:
                output = run.generate(labels[:batch])
            kernels = kernels_of(_trace(seen))
            schedule = schedule_of(model)
            row = {"batch": batch, "mode": output.timings.mode, "device_s": output.timings.device}
            row |= summary(kernels, len(schedule))
            works = expected_works(model, schedule, batch, result["device"]) if backend == "cuda" else None
            if works is not None:
                row["bounds"] = compare_kinds(kernels, works)
            result["rows"].append(row)
            save(result)


def _trace(seen: profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        return loaded
