"""What a worker runs before it is ready, so that no request pays for it."""

from __future__ import annotations

import itertools
import time

from flexvar_runtime import FlexVARPipeline, Guidance
from flexvar_runtime.deadlines.choice import quality_order
from flexvar_runtime.model.guidance import UNGUIDED

from ..settings import ModelSettings
from .messages import Ready


def warm_up(pipeline: FlexVARPipeline, model: ModelSettings) -> Ready:
    """Run what requests will need, and measure it.

    A GPU keeps a captured generation for each shape, so each runs: the allowed schedules, or without such those of the
    quality order, in every batch size, with and without guidance. A CPU keeps nothing for a shape: one generation opens
    all graphs.
    """
    whole = pipeline.generator.runs_whole
    schedules = quality_order(pipeline.bundle.manifest) if model.schedules is None else model.schedules
    shapes = itertools.product(schedules, model.batch_sizes, (True, False)) if whole else [(schedules[0], 1, True)]
    guided = pipeline.guidance if pipeline.guidance.acts(schedules[-1]) else Guidance()
    measured = []
    for schedule, images, with_guidance in shapes:
        guidance = guided if with_guidance else UNGUIDED
        pipeline.warmup(schedule, (images,), guidance)
        started = time.perf_counter()
        pipeline([0] * images, schedule, guidance, seed=0)
        measured.append((schedule, guidance.acts(schedule), images, time.perf_counter() - started))
    return Ready(
        bundle=pipeline.bundle.sha256,
        manifest=pipeline.bundle.manifest,
        backend=pipeline.backend.name,
        measured=tuple(measured),
    )
