"""Random schedules for training: the scales that the transformer sees in one step.

Source: the rule of the published trainer. For other sizes of the largest scale the rule is scaled in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..scales import Scales
from .scenes.stream import Stream

PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
DEFAULT_SHARE = 0.05  # probability of the default schedule
DROPS = (0.10, 0.05, 0.02, 0.01)
"""Probabilities that at least one, two, three or four scales are dropped."""
TAIL = 4  # above the token budget, one of the last four scales is dropped


def default_sides(side: int) -> tuple[int, ...]:
    """The default schedule for a largest side of `side` tokens. For 16 it is the published one, `PUBLISHED`."""
    return tuple(sorted({1, *(max(1, round(published * side / 16)) for published in PUBLISHED)}))


@dataclass(frozen=True)
class ScheduleRule:
    """The rule by which schedules are drawn.

    side: side of the largest scale, in tokens. budget: largest number of tokens in a schedule; 0 means that of the
    default schedule, which is 680 for side 16. Raises ConfigError for a side below 1 or a budget below 0.
    """

    side: int = 16
    budget: int = 0

    def __post_init__(self) -> None:
        if self.side < 1 or self.budget < 0:
            raise ConfigError(
                f"The largest side is {self.side}, but it must be at least 1."
                if self.side < 1
                else f"token_budget is {self.budget}, but it must be at least 0.",
                expected="a side of at least 1 and a budget of at least 0",
                fix="Correct the configuration.",
            )

    @property
    def default(self) -> tuple[int, ...]:
        """Sides of the default schedule."""
        return default_sides(self.side)

    @property
    def tokens(self) -> int:
        """Largest number of tokens in a schedule."""
        return self.budget or sum(side**2 for side in self.default)

    @property
    def small(self) -> range:
        """Small sides, of which five eighths are drawn: 3 … 10 for side 16."""
        return range(3, 1 + max(2, min(self.side - 1, self.side * 10 // 16)))

    @property
    def large(self) -> range:
        """Large sides, of which two fifths are drawn: 11 … 15 for side 16."""
        return range(self.small.stop, self.side)


def random_sides(rule: ScheduleRule, draws: Stream) -> tuple[int, ...]:
    """The sides of one random schedule of square scales, smallest first."""
    sides = list(rule.default)
    if not draws.chance(DEFAULT_SHARE):
        inner = _choose(rule.small, round(len(rule.small) * 5 / 8), draws)
        inner += _choose(rule.large, round(len(rule.large) * 2 / 5), draws)
        sides = sorted({1, min(2, rule.side), *inner, rule.side})
    luck = draws.between(0, 1)
    for probability in DROPS:
        if luck < probability and len(sides) > 3:  # the first two and the last stay
            del sides[draws.whole(2, len(sides) - 2)]
    while sum(side**2 for side in sides) > rule.tokens and len(sides) > 1:
        del sides[draws.whole(max(1, len(sides) - TAIL), len(sides) - 1)]
    return tuple(sides)


def random_schedule(rule: ScheduleRule, draws: Stream) -> Scales:
    """`random_sides` as (h, w) pairs."""
    return tuple((side, side) for side in random_sides(rule, draws))


def _choose(sides: range, count: int, draws: Stream) -> list[int]:
    """`count` different sides, drawn uniformly."""
    left = list(sides)
    return [left.pop(draws.whole(0, len(left) - 1)) for _ in range(count)]
