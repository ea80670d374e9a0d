"""The published random schedules: what scales a transformer sees in one step of training.

Source: the rule of the published trainer, FACTS 2 of this project; smaller and larger models follow it in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..scales import Scales
from .errors import ConfigError
from .scenes.stream import Stream

PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
DEFAULT_SHARE = 0.05
DROPS = (0.10, 0.05, 0.02, 0.01)
"""Probability that at least one, two, three, four scales are dropped."""
TAIL = 4  # above the budget one of so many last scales goes


def default_sides(side: int) -> tuple[int, ...]:
    """The published schedule in proportion to a largest side: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16) for 16."""
    return tuple(sorted({1, *(max(1, round(published * side / 16)) for published in PUBLISHED)}))


@dataclass(frozen=True)
class ScheduleRule:
    """How schedules are drawn.

    side: of the largest scale, in tokens; budget: most tokens of a schedule (0: those of the default schedule, 680
    for side 16).
    """

    side: int = 16
    budget: int = 0

    def __post_init__(self) -> None:
        if self.side < 1 or self.budget < 0:
            raise ConfigError(
                f"largest side {self.side} and budget {self.budget}",
                expected="a side of at least 1 and a budget of at least 0",
                fix="correct the configuration",
            )

    @property
    def default(self) -> tuple[int, ...]:
        return default_sides(self.side)

    @property
    def tokens(self) -> int:
        """Most tokens of a schedule."""
        return self.budget or sum(side**2 for side in self.default)

    @property
    def small(self) -> range:
        """Sides that five eighths are drawn from: 3 … 10 for 16."""
        return range(3, 1 + max(2, min(self.side - 1, self.side * 10 // 16)))

    @property
    def large(self) -> range:
        """Sides that two fifths are drawn from: 11 … 15 for 16."""
        return range(self.small.stop, self.side)


def random_sides(rule: ScheduleRule, draws: Stream) -> tuple[int, ...]:
    """One schedule of square scales, smallest first."""
    sides = list(rule.default)
    if not draws.chance(DEFAULT_SHARE):
        inner = _some(rule.small, round(len(rule.small) * 5 / 8), draws)
        inner += _some(rule.large, round(len(rule.large) * 2 / 5), draws)
        sides = sorted({1, min(2, rule.side), *inner, rule.side})
    luck = draws.between(0, 1)
    for probability in DROPS:
        if luck < probability and len(sides) > 3:  # never the first two, never the last
            del sides[draws.whole(2, len(sides) - 2)]
    while sum(side**2 for side in sides) > rule.tokens and len(sides) > 1:
        del sides[draws.whole(max(1, len(sides) - TAIL), len(sides) - 1)]
    return tuple(sides)


def random_schedule(rule: ScheduleRule, draws: Stream) -> Scales:
    """`random_sides` as (h, w) pairs."""
    return tuple((side, side) for side in random_sides(rule, draws))


def _some(sides: range, count: int, draws: Stream) -> list[int]:
    """`count` different ones, each set as likely as any other."""
    left = list(sides)
    return [left.pop(draws.whole(0, len(left) - 1)) for _ in range(count)]
