"""What a report reads off its records: medians, steps, limits, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from flexvar_runtime import ScaleSchedule

from .records import Ceiling, Measured
from .timing import quantiles

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def median_of(measured: Measured) -> float:
    return quantiles(measured.seconds)["median"]


def steps_of(schedule: str) -> int:
    return len(ScaleSchedule.parse(schedule))


def count_steps(measured: Measured) -> int:
    return steps_of(measured.scenario.schedule)


def limit_of(measured: Measured, ceiling: Ceiling) -> float | None:
    """Seconds that the arithmetic of a call takes at the measured rate of its precision."""
    rate = ceiling.flops_per_second.get(measured.scenario.precision)
    return measured.flops / rate if measured.flops is not None and rate else None


def parts_gap(measured: Measured) -> float | None:
    """How far the parts' sum is from the whole, as a share of it; None unless every part is told.

    Of results that do not say it call by call, of the medians.
    """
    scales, parts = measured.scales, (measured.condition, measured.sampling, measured.decode)
    known = [part for part in parts if part is not None]
    if not measured.seconds or scales is None or len(known) < len(parts):
        return None
    if measured.told is not None:
        return abs(measured.told - 1)
    median = median_of(measured)
    return abs(sum(known) + sum(scales) - median) / median


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def normal(schedule: str) -> str:
    return str(ScaleSchedule.parse(schedule))


def schedule_of(measured: Measured) -> str:
    return normal(measured.scenario.schedule)
