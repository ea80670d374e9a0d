"""Which sizes an engine is prepared for: an exact profile for all that the schedules need, a wide one for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from flexvar_runtime.backends.tensorrt.engine_files import DEVICE_LABELS, WIDE, Profile
from flexvar_runtime.memory.plan import IMAGES_PER_RUN
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.schedule import ScaleSchedule
from flexvar_runtime.model.signatures import CONDITION, PREFILL, STEP

FEW_HEADS = 4  # with fewer, TensorRT-RTX 1.7 has no attention kernel for exactly one query; for one or two it has


def step_pairs(schedules: Sequence[ScaleSchedule]) -> list[tuple[int, int]]:
    """(new, past) tokens of every scale of these schedules, each pair once, in order."""
    pairs = set()
    for schedule in schedules:
        past = 0
        for h, w in schedule:
            pairs.add((h * w, past))
            past += h * w
    return sorted(pairs)


def profiles(graph: str, schedules: Sequence[ScaleSchedule], max_batch: int, model: ModelFacts) -> tuple[Profile, ...]:
    """Profiles of a graph for these schedules and up to `max_batch` images; exact ones first, the wide one last.

    The wide one serves every schedule whose largest scale and whose tokens are no more than the largest asked for.
    """
    if graph == CONDITION:
        return (Profile(name=f"{DEVICE_LABELS} labels", axes={"labels": (DEVICE_LABELS,) * 3}),)
    if graph == STEP:
        return _step(schedules, max_batch, model.heads)
    if graph == PREFILL:
        return (_prefill(schedules, max_batch),)
    return _images(schedules, min(max_batch, IMAGES_PER_RUN))


def _step(schedules: Sequence[ScaleSchedule], max_batch: int, heads: int) -> tuple[Profile, ...]:
    rows = {"sequences": (1, 2, 2 * max_batch), "images": (1, 1, max_batch)}  # best: one image under guidance
    exact = [
        Profile(name=f"{new} after {past}", axes={**rows, "new": _new(new, heads), "past": (past,) * 3})
        for new, past in step_pairs(schedules)
    ]
    new, past = max(step_pairs(schedules))
    tokens = max(schedule.tokens for schedule in schedules)
    return *exact, Profile(name=WIDE, axes={**rows, "new": (1, new, new), "past": (0, past, tokens)})


def _prefill(schedules: Sequence[ScaleSchedule], max_batch: int) -> Profile:
    """How many scales are given differs from edit to edit: one wide profile, best at all but the last."""
    best = max(schedule.tokens - schedule[-1][0] * schedule[-1][1] for schedule in schedules)
    most = max(schedule.tokens for schedule in schedules)
    axes = {"sequences": (1, 2, 2 * max_batch), "new": (1, max(1, best), most)}
    return Profile(name=WIDE, axes=axes)


def _new(new: int, heads: int) -> tuple[int, int, int]:
    return (1, 1, 2) if new == 1 and heads < FEW_HEADS else (new, new, new)


def _images(schedules: Sequence[ScaleSchedule], images: int) -> tuple[Profile, ...]:
    sizes = sorted({schedule[-1] for schedule in schedules})
    exact = [
        Profile(name=f"{h}x{w}", axes={"images": (1, 1, images), "height": (h,) * 3, "width": (w,) * 3})
        for h, w in sizes
    ]
    side = max(max(scale) for schedule in schedules for scale in schedule)  # previews decode any scale
    best_h, best_w = max(sizes, key=lambda size: size[0] * size[1])
    axes = {"images": (1, 1, images), "height": (1, best_h, side), "width": (1, best_w, side)}
    return *exact, Profile(name=WIDE, axes=axes)
