"""Choose the best schedule that is fast enough for a deadline, from measured costs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bundle.manifest import Manifest
from ..checks import invalid, shown
from ..errors import CostUnknown, InvalidInput
from ..model.schedule import PUBLISHED, ScaleSchedule


@dataclass(frozen=True)
class Choice:
    """A chosen schedule. expected, deadline: in seconds. reason: a sentence.

    considered: every schedule of the quality order with its cost in seconds, best first. A cost is None if it is not
    known, which is possible only after the chosen one.
    """

    schedule: ScaleSchedule
    expected: float
    deadline: float
    reason: str
    considered: tuple[tuple[ScaleSchedule, float | None], ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schedule": str(self.schedule),
            "expected_ms": self.expected * 1e3,
            "deadline_ms": self.deadline * 1e3,
            "reason": self.reason,
            "considered": [
                {"schedule": str(schedule), "expected_ms": None if cost is None else cost * 1e3}
                for schedule, cost in self.considered
            ],
        }


def quality_order(manifest: Manifest) -> tuple[ScaleSchedule, ...]:
    """The schedules from which a deadline chooses, best first.

    These are the ones that the bundle names. If it names none, they are its default, followed by the published
    schedules of the same size that have fewer tokens in all, more tokens first."""
    named = manifest.defaults.quality_order
    if named:
        return tuple(ScaleSchedule.parse(text) for text in named)
    default = ScaleSchedule.parse(manifest.defaults.schedule)
    published = {ScaleSchedule.parse(text) for text in PUBLISHED.values()}
    shorter = (one for one in published if one[-1] == default[-1] and one.tokens < default.tokens)
    return (default, *sorted(shorter, key=lambda one: one.tokens, reverse=True))


def seconds_of(deadline_ms: float) -> float:
    """A deadline in milliseconds as seconds. Raises InvalidInput unless it is a finite number above 0."""
    number = isinstance(deadline_ms, int | float | np.integer | np.floating) and not isinstance(deadline_ms, bool)
    if not number or not 0 < deadline_ms <= sys.float_info.max:  # NaN compares false
        fix = "Pass the time limit in milliseconds, such as 250."
        raise invalid(f"deadline_ms is {shown(deadline_ms)}", "a number above 0", fix)
    return float(deadline_ms) / 1e3


def choose(
    order: Sequence[ScaleSchedule],
    cost: Callable[[ScaleSchedule], float | None],
    deadline: float,
    measure: str = "pipe.measure_costs()",
) -> Choice:
    """The first schedule of `order` (best first) whose cost is at most `deadline`, both in seconds.

    Raises CostUnknown if the cost of a better schedule is not known, because that one might fit; its fix is the call
    `measure`. Raises InvalidInput if no schedule fits.
    """
    considered = tuple((schedule, cost(schedule)) for schedule in order)
    slower: list[tuple[float, ScaleSchedule]] = []
    for schedule, seconds in considered:
        if seconds is None:
            raise CostUnknown(
                f"deadline_ms needs the time of schedule {schedule} for such a request, which was not measured here.",
                expected="the costs of all schedules up to the first that fits",
                fix=f"Measure it once: {measure}",
                schedule=str(schedule),
            )
        if seconds <= deadline:
            return Choice(schedule, seconds, deadline, _reason(slower, len(considered), deadline), considered)
        slower.append((seconds, schedule))
    if not slower:
        raise InvalidInput("There is no schedule to choose from.", expected="a schedule", fix="Pass at least one.")
    fastest, schedule = min(slower, key=lambda one: one[0])
    raise InvalidInput(
        f"The deadline is {_ms(deadline)}, but the fastest schedule, {schedule}, takes {_ms(fastest)}.",
        expected=f"a deadline of at least {math.ceil(fastest * 1e3)} ms",
        fix="Allow more time, or generate fewer images at once.",
    )


def _reason(slower: list[tuple[float, ScaleSchedule]], count: int, deadline: float) -> str:
    if not slower:
        return f"It is the best of {count} schedules, and fast enough for {_ms(deadline)}."
    seconds, better = slower[-1]
    return (
        f"It is the best of {count} schedules that is fast enough for {_ms(deadline)}. The next better one, {better}, "
        f"takes {_ms(seconds)}."
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
