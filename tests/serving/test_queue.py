"""The queue: how batches form, which entry goes first, and how long a job can be passed by shorter ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_serving.scheduling import queue as module
from flexvar_serving.scheduling.orders import Order
from flexvar_serving.scheduling.queue import Entry, Queue
from flexvar_serving.workers.messages import EditJob

SIZES = (1, 2, 4, 8)


def job(number: int, images: int = 1, *, key: str = "a", seconds: float = 1, arrived: float = 0) -> list[Entry]:
    return [Entry(job=number, index=i, key=key, seconds=seconds, arrived=arrived) for i in range(images)]


def queue_of(*jobs: list[Entry], limit: int = 1000) -> Queue:
    return Queue(limit).with_entries(entry for entries in jobs for entry in entries)


def names(batch: tuple[Entry, ...]) -> list[tuple[int, int]]:
    return [(entry.job, entry.index) for entry in batch]


@pytest.mark.parametrize(
    ("waiting", "size"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (7, 4), (8, 8), (9, 8), (30, 8)]
)
def test_a_batch_is_what_waits_rounded_down_to_an_allowed_size(waiting: int, size: int) -> None:
    queue = queue_of(*(job(number) for number in range(waiting)))
    batch, rest = queue.next_batch(0, SIZES)
    assert names(batch) == [(number, 0) for number in range(size)]
    assert [entry.job for entry in rest.entries] == list(range(size, waiting)) and rest.limit == queue.limit
    assert len(queue) == waiting  # a queue is a value


def test_other_allowed_sizes() -> None:
    queue = queue_of(job(1, 7))
    assert len(queue.next_batch(0, (1,))[0]) == 1
    assert len(queue.next_batch(0, {6, 1, 5})[0]) == 6
    assert len(queue.next_batch(0, (1, 64))[0]) == 1


def test_only_equal_keys_share_a_batch() -> None:
    queue = queue_of(job(1, key="a"), job(2, 2, key="b"), job(3, key="a"))
    batch, rest = queue.next_batch(0, SIZES)
    assert names(batch) == [(1, 0), (3, 0)]
    assert names(rest.next_batch(0, SIZES)[0]) == [(2, 0), (2, 1)]


def test_the_shortest_goes_first_then_the_one_that_came_first() -> None:
    queue = queue_of(job(1, seconds=3), job(2, seconds=1), job(3, seconds=2))
    assert [entry.job for entry in queue.next_batch(0, SIZES)[0]] == [2, 3]
    # 5 + 4 s, 6 + 3 s and 7 + 2 s are equal: the one that waited longest is first
    queue = queue_of(job(1, seconds=4, arrived=5), job(2, seconds=2, arrived=7), job(3, seconds=3, arrived=6))
    assert [entry.job for entry in queue.next_batch(7, (1, 3))[0]] == [1, 3, 2]
    assert names(queue_of(job(2, 2), job(1, 2)).next_batch(0, SIZES)[0]) == [(1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(("arrived", "first"), [(0, "short"), (7.75, "short"), (8, "long"), (8.25, "long")])
def test_a_long_job_goes_before_a_short_one_that_comes_later_by_the_difference(arrived: float, first: str) -> None:
    queue = queue_of(job(1, seconds=10), job(2, seconds=2, arrived=arrived))
    for now in (arrived, arrived + 100):  # both age alike
        batch, _ = queue.next_batch(now, (1,))
        assert batch[0].job == {"long": 1, "short": 2}[first]


def test_the_queue_is_bounded() -> None:
    queue = queue_of(job(1, 3), limit=5)
    assert queue.has_room(2) and not queue.has_room(3)
    assert len(queue.with_entries(job(2, 2))) == 5
    with pytest.raises(ValueError, match="6 entries in a queue of 5"):
        queue.with_entries(job(2, 3))
    assert len(queue) == 3


def test_deadlines_and_jobs_that_leave() -> None:
    limited = [replace(entry, deadline=10.0) for entry in job(1, 2)]
    queue = queue_of(limited, job(2), [replace(entry, deadline=12.0) for entry in job(3)])
    assert [queue.expired(now) for now in (9.9, 10, 10.1, 12.5)] == [set(), set(), {1}, {1, 3}]
    assert queue.without({1, 7}).entries == queue.entries[2:]
    assert not len(queue.without({1, 2, 3})) and queue.without(()) == queue


def test_the_work_before_a_new_job() -> None:
    queue = queue_of(job(1, 2, seconds=3), job(2, seconds=10))
    assert Queue(5).seconds(4) == 0
    assert queue.seconds(100) == queue.seconds(10) == 13  # a job counts once, not for each of its images
    assert queue.seconds(4) == 3 + 8  # of a longer job twice the cost at most
    assert queue.seconds(1) == 2 + 2


seconds = st.integers(0, 12).map(float)  # whole numbers, so that ranks are exact
arrivals = st.lists(
    st.tuples(st.integers(1, 6), st.sampled_from("ab"), seconds, st.integers(0, 3), st.booleans()), max_size=20
)
allowed = st.sets(st.integers(2, 9), max_size=3).map(lambda sizes: sizes | {1})


@settings(deadline=None)
@given(arrivals, allowed)
def test_no_entry_is_lost_or_taken_twice(plan: list[tuple[int, str, float, int, bool]], sizes: set[int]) -> None:
    """Jobs come and batches are taken in any order. Then the queue is emptied."""
    queue, now, put, taken = Queue(1000), 0.0, [], []
    steps = [*plan, *([None] * sum(images for images, *_ in plan))]
    for number, step in enumerate(steps):
        if step is not None:
            images, key, length, gap, _ = step
            now += gap
            entries = job(number, images, key=key, seconds=length, arrived=now)
            queue, put = queue.with_entries(entries), put + entries
        if step is None or step[-1]:
            batch, rest = queue.next_batch(now, sizes)
            assert (len(batch) in sizes) == (len(queue) > 0)
            if batch:
                assert batch[0] == min(queue.entries, key=lambda entry: entry.rank(now))
                equal = [entry for entry in queue.entries if entry.key == batch[0].key]
                assert {entry.key for entry in batch} == {batch[0].key}
                assert not any(len(batch) < size <= len(equal) for size in sizes)
                left_out = [entry.rank(now) for entry in equal if entry not in batch]
                assert all(max(entry.rank(now) for entry in batch) < rank for rank in left_out)
            queue, taken = rest, taken + list(batch)
    assert not len(queue)
    assert sorted(names(tuple(taken))) == sorted(names(tuple(put)))
    for number in {entry.job for entry in put}:
        assert [entry.index for entry in taken if entry.job == number] == [e.index for e in put if e.job == number]


def start_of_long_job(length: float, short: float, gap: float, until: float) -> float | None:
    """When one worker begins a job of `length` seconds that came at 0, as did the first of a stream of short ones.

    None if it has not begun by `until`.
    """
    queue, now, coming = queue_of(job(0, seconds=length)), 0.0, 0
    while now < until:
        while coming * gap <= now:
            queue = queue.with_entries(job(1 + coming, seconds=short, arrived=coming * gap))
            coming += 1
        batch, queue = queue.next_batch(now, (1,))
        if batch[0].job == 0:
            return now
        now += batch[0].seconds
    return None


@settings(deadline=None)
@given(length=st.integers(1, 40), short=st.integers(1, 8), gap=st.integers(1, 8))
def test_no_job_starves(length: int, short: int, gap: int) -> None:
    """A short job passes a longer one only if it comes less than `length - short` seconds after it.

    So at most ceil((length - short) / gap) short jobs pass, also if more come than can ever run.
    """
    passing = max(0, -(-(length - short) // gap))
    start = start_of_long_job(length, short, gap, until=passing * short + 1)
    assert start is not None and start <= passing * short
    if short >= gap:  # the worker is never idle without the long job, so all of them are there in time
        assert start == passing * short


def test_without_ageing_a_job_would_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_of_long_job(10, 1, 0.5, until=50) == 18
    monkeypatch.setattr(module, "AGEING", 0.0)
    assert start_of_long_job(10, 1, 0.5, until=50) is None


# Which orders share a batch -------------------------------------------------------------------------------------------


def order(**changes: Any) -> Order:
    schedule = ScaleSchedule.parse("1_2_4")
    plain = Order(
        label=1,
        images=1,
        seed=5,
        first_index=0,
        schedule=schedule,
        forecast_schedule=schedule,
        guidance=Guidance(2.5),
        sampling=Sampling(),
    )
    return replace(plain, **changes)


@pytest.mark.parametrize(
    "changes", [{"label": 2}, {"seed": 6}, {"first_index": 3}, {"images": 4}, {"guidance": Guidance(1.5)}]
)
def test_orders_that_share_a_batch(changes: dict[str, Any]) -> None:
    assert order().key(1) == order(**changes).key(2)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": ScaleSchedule.parse("1_4")},
        {"sampling": Sampling(top_k=10)},
        {"guidance": Guidance(0)},
        {"guidance": Guidance(2.5, "constant")},
        {"guidance": Guidance(2.5, max_side=2)},
        {"streamed": True},
        {"previews": 2},
        {"exact": True},
        {"edit": EditJob(image=b"", mask=None, task=None, steps=None)},
    ],
)
def test_orders_that_do_not(changes: dict[str, Any]) -> None:
    assert order().key(1) != order(**changes).key(1)
    if order(**changes).alone:
        assert order(**changes).key(1) != order(**changes).key(2)
        assert order(**changes).key(1) == order(**changes).key(1)  # its own images run together
