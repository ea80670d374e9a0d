"""How long generations take: measured at start, corrected by every batch that runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flexvar_runtime import ScaleSchedule

NEWEST = 0.2
"""Weight of the newest batch in a moving average."""
MOST_KNOWN = 256
"""Kinds of work that are remembered, the latest ones: clients may ask for any number of schedules."""
SPREADS = 2.0
"""A careful forecast is the mean and this many mean deviations."""


@dataclass(frozen=True)
class Work:
    """What determines the cost of a batch. tokens: of all scales of one image."""

    tokens: int
    guided: bool
    images: int

    @classmethod
    def of(cls, schedule: ScaleSchedule, guided: bool, images: int) -> Work:
        return cls(schedule.tokens, guided, images)

    @property
    def size(self) -> float:
        """Token positions that the transformer computes: two sequences for a guided image."""
        return self.tokens * self.images * (2.0 if self.guided else 1.0)


@dataclass(frozen=True)
class Seconds:
    """A moving average of seconds, and of their distance from it."""

    mean: float
    deviation: float = 0.0

    def observed(self, seconds: float) -> Seconds:
        deviation = self.deviation + NEWEST * (abs(seconds - self.mean) - self.deviation)
        return Seconds(self.mean + NEWEST * (seconds - self.mean), deviation)

    @property
    def careful(self) -> float:
        return self.mean + SPREADS * self.deviation


@dataclass(frozen=True)
class Costs:
    """Seconds of every work that ran. Other work is estimated from the nearest that ran, in proportion to its size."""

    known: Mapping[Work, Seconds] = field(default_factory=dict)

    def mean(self, work: Work) -> float:
        """Expected seconds of a batch. 0 if nothing has run yet."""
        return self._of(work).mean

    def careful(self, work: Work) -> float:
        """Seconds that most batches do not exceed."""
        return self._of(work).careful

    def observed(self, work: Work, seconds: float) -> Costs:
        """The costs after one more batch. Its first time replaces the estimate."""
        known = self.known.get(work)
        updated = Seconds(seconds) if known is None else known.observed(seconds)
        others = [one for one in self.known if one != work][-(MOST_KNOWN - 1) :]
        return replace(self, known={**{one: self.known[one] for one in others}, work: updated})

    def _of(self, work: Work) -> Seconds:
        if work in self.known:
            return self.known[work]
        if not self.known:
            return Seconds(0.0)
        nearest = min(
            self.known, key=lambda other: (max(other.size, work.size) / min(other.size, work.size), other.size)
        )
        ratio = work.size / nearest.size
        found = self.known[nearest]
        return Seconds(found.mean * ratio, found.deviation * ratio)
