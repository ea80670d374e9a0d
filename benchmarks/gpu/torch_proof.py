"""Tests the runtime's device path on this GPU, with torch modules as its graphs: parity, replays, times and memory."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from flexvar_export.bundle import TORCH_PRECISIONS
from flexvar_runtime import Bundle, FlexVARPipeline, Sampling
from flexvar_runtime.backends.base import Backend
from flexvar_runtime.cuda.gpu import CudaDevice, CudaReplay, GpuFacts, find_gpu

from ..timing import Budget
from .files import ModelFiles, Save
from .hardware import used_bytes
from .parity import equal_share, parity
from .random_models import default_guidance, load_proof, random_model, schedule_of
from .runtime_jobs import Opened, latency, memory_growth
from .torch_backend import TorchBackend

GUIDANCE_SCALES = (2.5, 4.0)
IMAGES = 3  # of the replays. Parity generates two at a time, so only the replays use this shape


class CountingDevice(CudaDevice):
    """A GPU that counts its captures, including those that fail."""

    def __init__(self, facts: GpuFacts) -> None:
        super().__init__(facts)
        self.captures = 0

    def capture(self, enqueue: Callable[[], None]) -> CudaReplay:
        self.captures += 1
        return super().capture(enqueue)


def start_device() -> CountingDevice:
    """The first GPU. Raises BackendUnavailable."""
    device = CountingDevice(find_gpu())
    device.activate()
    return device


def proof(
    work: Path,
    model: str,
    batches: Sequence[int],
    generations: int,
    seeds: Sequence[int],
    budget: Budget,
    save: Save,
) -> None:
    """Open the bundle of a model in the folder of a run and report on it part by part, saving after each.

    seeds: of the replays.

    A part that fails is recorded under "failed" with its error, and the others still run. Raises RuntimeError after
    the last part if any failed.
    """
    device = start_device()
    torch.backends.cudnn.allow_tf32 = False  # the gate of fp32 is 1e-5
    start = time.perf_counter()
    weights = random_model(model)
    weights_s, start = time.perf_counter() - start, time.perf_counter()
    bundle = Bundle.open(ModelFiles.of(work, model).bundle, allow_unproved=True)
    backend = TorchBackend(device, *weights, TORCH_PRECISIONS[bundle.manifest.precision])
    with FlexVARPipeline(bundle, cast(Backend, backend)) as pipeline:  # the protocol allows `device` to be None
        run = Opened(pipeline, model, time.perf_counter() - start)
        rows: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        result = run.facts | {"torch": torch.__version__, "weights_s": weights_s, "rows": rows, "failed": failed}

        def keep(name: str, found: Any) -> None:
            result[name] = found
            save(result)

        def measure(batch: int) -> None:
            rows.append(latency(run, batch, budget, used_bytes()))
            save(result)

        parts: dict[str, Callable[[], None]] = {
            "parity": lambda: keep("parity", parity(pipeline, load_proof(work, model))),
            "replays": lambda: keep("replays", replays(run, device, seeds)),
            **{f"batch {batch}": lambda batch=batch: measure(batch) for batch in batches},  # type: ignore[misc]
            "growth": lambda: memory_growth(run, generations, lambda found: keep("growth", found)),
        }
        save(result)
        for name, part in parts.items():
            try:
                part()
            except Exception as error:
                print(f"{name}:", file=sys.stderr)
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}"
                save(result)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(parts)} parts failed: {', '.join(failed)}.")


def replays(run: Opened, device: CountingDevice, seeds: Sequence[int]) -> dict[str, Any]:
    """Compare whole generations with the same requests scale by scale.

    Each request has another seed, guidance scale and classes. holds: all tokens are equal, and one captured CUDA graph
    served every request.
    """
    before, classes, found = device.captures, run.pipeline.model.classes, []
    for turn, (seed, scale) in enumerate(product(seeds, GUIDANCE_SCALES)):
        labels = [(turn + i) % classes for i in range(IMAGES)]
        request = labels, schedule_of(run.model), replace(default_guidance(), scale=scale), Sampling(), seed
        whole = run.pipeline(*request)
        stepwise = [step.tokens for step in run.pipeline.iter_scales(*request)]
        found.append(
            {
                "seed": seed,
                "guidance_scale": scale,
                "labels": labels,
                "mode": whole.timings.mode,
                "equal": equal_share(whole.tokens, stepwise),
            }
        )
    captures = device.captures - before
    holds = captures == 1 and all(row["equal"] == 1 and row["mode"] == "cuda-graph" for row in found)
    return {"holds": holds, "captures": captures, "requests": found}
