"""The optimisation profiles of an engine: an exact one for every size of the schedules, and a wide one for others."""

from __future__ import annotations

from collections.abc import Sequence

from flexvar_runtime.backends.tensorrt.engine_files import WIDE, Profile
from flexvar_runtime.memory.plan import IMAGES_PER_RUN
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.schedule import ScaleSchedule
from flexvar_runtime.model.signatures import CONDITION, DEVICE_LABELS, PREFILL, STEP

FEW_HEADS = 4  # with fewer heads, TensorRT-RTX 1.7 has an attention kernel for 1 to 2 queries, but none for exactly 1


def step_pairs(schedules: Sequence[ScaleSchedule]) -> list[tuple[int, int]]:
    """The (new, past) numbers of tokens of every scale of these schedules, each pair once, sorted."""
    pairs = set()
    for schedule in schedules:
        past = 0
        for h, w in schedule:
            pairs.add((h * w, past))
            past += h * w
    return sorted(pairs)


def profiles(graph: str, schedules: Sequence[ScaleSchedule], max_batch: int, model: ModelFacts) -> tuple[Profile, ...]:
    """The profiles of a graph for these schedules and up to `max_batch` images. The wide one is last.

    The wide profile serves every schedule with no more tokens, and no larger scale, than the given ones.
    """
    if graph == CONDITION:
        return (Profile(name=f"{DEVICE_LABELS} labels", axes={"labels": (DEVICE_LABELS,) * 3}),)
    if graph == STEP:
        return _step(schedules, max_batch, model.heads)
    if graph == PREFILL:
        return (_prefill(schedules, max_batch),)
    return _images(schedules, min(max_batch, IMAGES_PER_RUN))


def _step(schedules: Sequence[ScaleSchedule], max_batch: int, heads: int) -> tuple[Profile, ...]:
    rows = {"sequences": (1, 2, 2 * max_batch), "images": (1, 1, max_batch)}  # optimised for one guided image
    exact = [
        Profile(name=f"{new} after {past}", axes={**rows, "new": _new_tokens(new, heads), "past": (past,) * 3})
        for new, past in step_pairs(schedules)
    ]
    new, past = max(step_pairs(schedules))
    tokens = max(schedule.tokens for schedule in schedules)
    return *exact, Profile(name=WIDE, axes={**rows, "new": (1, new, new), "past": (0, past, tokens)})


def _prefill(schedules: Sequence[ScaleSchedule], max_batch: int) -> Profile:
    """One wide profile, because edits give different numbers of scales. It is optimised for all but the last scale."""
    best = max(schedule.tokens - schedule[-1][0] * schedule[-1][1] for schedule in schedules)
    most = max(schedule.tokens for schedule in schedules)
    axes = {"sequences": (1, 2, 2 * max_batch), "new": (1, max(1, best), most)}
    return Profile(name=WIDE, axes=axes)


def _new_tokens(new: int, heads: int) -> tuple[int, int, int]:
    """The (smallest, best, largest) number of new tokens of an exact profile."""
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
