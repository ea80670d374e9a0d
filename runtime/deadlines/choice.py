"""Which schedule to take when a generation has to be done in time: the best that fits, by known costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle.manifest import Manifest
from ..errors import CostUnknown, InvalidInput
from ..model.schedule import PUBLISHED, ScaleSchedule


@dataclass(frozen=True)
class Choice:
    """The schedule that was taken, the seconds it is expected to take, and why it and no other.

    considered: every schedule of the quality order with its cost in seconds, best first; None where it was not known,
    which is possible only after the one that was taken.
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
    """Schedules of a bundle, best first: those it names, else the default and then what is published and shorter.

    The rule for a bundle that names none: its default first, then every published schedule that ends in the same size
    with fewer tokens in all, more tokens first. A longer one is no way to be in time.
    """
    named = manifest.defaults.quality_order
    if named:
        return tuple(ScaleSchedule.parse(text) for text in named)
    default = ScaleSchedule.parse(manifest.defaults.schedule)
    published = {ScaleSchedule.parse(text) for text in PUBLISHED.values()}
    shorter = (one for one in published if one[-1] == default[-1] and one.tokens < default.tokens)
    return (default, *sorted(shorter, key=lambda one: one.tokens, reverse=True))


def seconds_of(deadline_ms: float) -> float:
    """A deadline in milliseconds as seconds. Raises InvalidInput unless it is a finite number above 0."""
    number = isinstance(deadline_ms, int | float) and not isinstance(deadline_ms, bool)
    if not number or not 0 < deadline_ms < math.inf:  # NaN compares false
        raise InvalidInput(
            f"a deadline of {deadline_ms!r:.100} ms", expected="a number above 0", fix="give milliseconds: 250"
        )
    return deadline_ms / 1e3


def choose(
    order: Sequence[ScaleSchedule],
    cost: Callable[[ScaleSchedule], float | None],
    deadline: float,
    measure: str = "pipe.measure_costs()",
) -> Choice:
    """The first schedule of `order`, best first, whose cost is at most `deadline`; both in seconds.

    A better one whose cost is unknown is not passed over: it might fit. Raises CostUnknown then, with the call
    `measure` as its fix, and InvalidInput where none fits.
    """
    considered = tuple((schedule, cost(schedule)) for schedule in order)
    slower: list[tuple[float, ScaleSchedule]] = []
    for schedule, seconds in considered:
        if seconds is None:
            raise CostUnknown(
                f"a deadline, and no measured time of schedule {schedule}",
                expected="the times of all schedules up to the first that fits",
                fix=f"measure them once: {measure}",
                schedule=str(schedule),
            )
        if seconds <= deadline:
            return Choice(schedule, seconds, deadline, _reason(slower, len(considered), deadline), considered)
        slower.append((seconds, schedule))
    if not slower:
        raise InvalidInput("no schedule to choose from", expected="at least one", fix="name some, best first")
    fastest, schedule = min(slower, key=lambda one: one[0])
    raise InvalidInput(
        f"a deadline of {_ms(deadline)}: the fastest, {schedule}, takes {_ms(fastest)}",
        expected=f"a deadline of at least {math.ceil(fastest * 1e3)} ms",
        fix="allow more time, or run fewer images at once",
    )


def _reason(slower: list[tuple[float, ScaleSchedule]], count: int, deadline: float) -> str:
    if not slower:
        return f"the best of {count} is fast enough for {_ms(deadline)}"
    seconds, better = slower[-1]
    return (
        f"the best of {count} that is fast enough for {_ms(deadline)}; the next better, {better}, takes {_ms(seconds)}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
