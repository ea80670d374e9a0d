"""Numbers that a report computes from its records: medians, steps, limits and groups."""

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
    """Seconds that the arithmetic of a call takes at the measured rate of its precision. None if unknown."""
    rate = ceiling.flops_per_second.get(measured.scenario.precision)
    return measured.flops / rate if measured.flops is not None and rate else None


def parts_gap(measured: Measured) -> float | None:
    """The difference between a call and the sum of its parts, as a share of the call. None unless all parts are known.

    Without `told`, it is computed from the medians.
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
    """The items by their key, in the order of their first occurrence."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def normal(schedule: str) -> str:
    """A schedule in its normal form, so that equal schedules have equal texts."""
    return str(ScaleSchedule.parse(schedule))


def schedule_of(measured: Measured) -> str:
    return normal(measured.scenario.schedule)
