"""The queue of images that wait, and the choice of the next batch. Everything here is a value or a pure function.

A batch is formed at the moment when a worker is free. It takes what waits and may share a batch, rounded down to an
allowed size. Nothing waits for company and nothing is padded. Short jobs go first, but a job that waits gains on the
shorter ones that come after it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace

AGEING = 1.0
"""A job that has waited for t seconds is ranked as if it were AGEING · t seconds shorter."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image that waits.

    job: number of its job. index: number of the image in the job. key: entries of equal keys may share a batch.
    seconds: forecast of the whole job. arrived, deadline: on the clock of the caller; deadline None means no limit.
    """

    job: int
    index: int
    key: Hashable
    seconds: float
    arrived: float
    deadline: float | None = None

    def rank(self, now: float) -> tuple[float, float, int, int]:
        """The entry with the smallest rank goes first."""
        return self.seconds - AGEING * (now - self.arrived), self.arrived, self.job, self.index


@dataclass(frozen=True)
class Queue:
    """Entries that wait, at most `limit`."""

    limit: int
    entries: tuple[Entry, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def has_room(self, images: int) -> bool:
        return len(self.entries) + images <= self.limit

    def with_entries(self, entries: Iterable[Entry]) -> Queue:
        """The queue with more entries. Raises ValueError if there is no room: ask `has_room` first."""
        grown = replace(self, entries=(*self.entries, *entries))
        if len(grown) > self.limit:
            raise ValueError(f"{len(grown)} entries in a queue of {self.limit}")
        return grown

    def without(self, jobs: Collection[int]) -> Queue:
        """The queue without the entries of some jobs."""
        return replace(self, entries=tuple(entry for entry in self.entries if entry.job not in jobs))

    def expired(self, now: float) -> set[int]:
        """Jobs with an entry whose deadline has passed."""
        return {entry.job for entry in self.entries if entry.deadline is not None and entry.deadline < now}

    def seconds(self, cost: float) -> float:
        """Estimated seconds of work that runs before a new job of `cost` seconds: all of each job that is not longer,
        and at most 2 · cost of each longer one."""
        jobs = {entry.job: entry.seconds for entry in self.entries}
        return sum(min(seconds, 2 * cost) if seconds > cost else seconds for seconds in jobs.values())

    def next_batch(self, now: float, sizes: Collection[int]) -> tuple[tuple[Entry, ...], Queue]:
        """The entries that run next, and the queue without them. The batch is empty if nothing waits.

        sizes: the allowed numbers of images, which include 1.
        """
        if not self.entries:
            return (), self
        ranked = sorted(self.entries, key=lambda entry: entry.rank(now))
        fitting = [entry for entry in ranked if entry.key == ranked[0].key]
        size = max(size for size in sizes if size <= len(fitting))
        batch = tuple(fitting[:size])
        taken = {(entry.job, entry.index) for entry in batch}
        rest = tuple(entry for entry in self.entries if (entry.job, entry.index) not in taken)
        return batch, replace(self, entries=rest)
