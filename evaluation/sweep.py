"""Metrics of one model against steps, guidance and precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.guidance import Guidance

from .runs.settings import RunSettings
from .scoring import Metrics, Paired


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a sweep. name: also that of its run."""

    name: str
    bundle: Path
    schedule: ScaleSchedule
    guidance: Guidance

    @property
    def steps(self) -> int:
        return len(self.schedule)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A point with its metrics. precision: of the bundle. against: the difference in FID to the first point."""

    point: Point
    precision: str
    settings: RunSettings
    metrics: Metrics
    against: Paired | None


def bundle_names(bundles: Sequence[Path]) -> list[str]:
    """A short name for each bundle. Raises InvalidInput if two have the same one."""
    names = [bundle.resolve().name.removesuffix(".bundle") for bundle in bundles]
    if len(set(names)) < len(names):
        got = f"Two bundles have the name {next(name for name in names if names.count(name) > 1)!r}."
        raise InvalidInput(got, expected="bundles with different names", fix="Rename one of their directories.")
    return names


def points_of(
    pipe: FlexVARPipeline, bundle: Path, name: str, steps: Sequence[int] | None, scales: Sequence[float] | None
) -> Iterator[Point]:
    """The points of one bundle: every number of steps with every guidance scale.

    steps, scales: None means the default of the bundle alone. Raises InvalidInput.
    """
    schedules = [pipe.schedule]
    if steps is not None:
        last = pipe.schedule[-1]
        schedules = [ScaleSchedule.for_size(last, count, max(last)) for count in steps]
        twice = next((one for one in schedules if schedules.count(one) > 1), None)
        if twice is not None:
            got = f"Two numbers of --steps give the same schedule {twice}, because the images are small."
            raise InvalidInput(got, expected="numbers that give different schedules", fix="Leave one of them out.")
    for schedule in schedules:
        for scale in [pipe.guidance.scale] if scales is None else scales:
            guidance = Guidance(scale, pipe.guidance.rule, pipe.guidance.max_side)
            yield Point(
                name=f"{name}_{len(schedule)}steps_cfg{_short(scale)}",
                bundle=bundle,
                schedule=schedule,
                guidance=guidance,
            )


def _short(scale: float) -> str:
    """A number as text that no other number has."""
    return repr(float(scale)).removesuffix(".0")


def parse_numbers(option: str, text: str, convert: Callable[[str], float]) -> list[float]:
    """ "6,8,10" as different numbers of at least 0, in that order. Raises InvalidInput."""
    try:
        numbers = [convert(part.strip()) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or not all(math.isfinite(n) and n >= 0 for n in numbers):
        got = f"{option} is {text[:100]!r}, but it must be different numbers joined by commas."
        raise InvalidInput(got, expected="different numbers", fix="Write them like 6,8,10.")
    return numbers
