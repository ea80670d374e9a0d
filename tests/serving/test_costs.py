"""Costs: what is known of a batch before it runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexvar_runtime import ScaleSchedule
from flexvar_serving.scheduling.costs import NEWEST, SPREADS, Costs, Seconds, Work

works = st.builds(Work, tokens=st.integers(1, 5000), guided=st.booleans(), images=st.integers(1, 64))
seconds = st.floats(1e-4, 100)
PLAIN = Work(tokens=100, guided=False, images=1)


def plain(tokens: int) -> Work:
    return Work(tokens, guided=False, images=1)


def test_the_size_of_a_work() -> None:
    work = Work.of(ScaleSchedule.parse("1_2_3x5"), guided=False, images=3)
    assert work == Work(20, guided=False, images=3) and work.size == 60
    assert Work(20, guided=True, images=3).size == 120  # two sequences for each image


@given(works)
def test_nothing_is_known_at_first(work: Work) -> None:
    assert Costs().mean(work) == Costs().careful(work) == 0


@given(works, seconds, works)
def test_an_estimate_is_in_proportion_to_the_size(known: Work, measured: float, other: Work) -> None:
    costs = Costs().observed(known, measured)
    assert costs.mean(known) == measured
    assert costs.mean(other) == pytest.approx(measured * other.size / known.size, rel=1e-12)


def test_the_nearest_work_by_ratio_decides() -> None:
    costs = Costs().observed(plain(100), 1.0).observed(plain(400), 2.0)
    assert costs.mean(plain(50)) == 0.5
    assert costs.mean(plain(150)) == 1.5
    assert costs.mean(plain(300)) == 1.5
    assert costs.mean(plain(800)) == 4.0
    assert costs.mean(plain(200)) == 2.0  # both differ by a factor of 2: the smaller one


def test_a_measurement_replaces_the_estimate() -> None:
    costs = Costs().observed(plain(100), 1.0)
    assert costs.mean(plain(200)) == 2.0
    assert costs.observed(plain(200), 9.0).mean(plain(200)) == 9.0
    assert costs.observed(plain(200), 9.0).mean(plain(100)) == 1.0
    assert costs.mean(plain(200)) == 2.0  # costs are a value


def test_the_moving_average() -> None:
    after = Seconds(1.0).observed(2.0)
    assert after.mean == pytest.approx(1 + NEWEST) and after.deviation == pytest.approx(NEWEST)
    assert after.careful == pytest.approx(after.mean + SPREADS * after.deviation)
    costs = Costs().observed(PLAIN, 1.0).observed(PLAIN, 2.0)
    assert costs.careful(PLAIN) == after.careful
    assert costs.careful(plain(300)) == pytest.approx(3 * after.careful)  # the spread is in proportion too


def test_old_batches_are_forgotten() -> None:
    costs = Costs().observed(PLAIN, 10.0)
    for _ in range(60):
        costs = costs.observed(PLAIN, 1.0)
    # (1 - NEWEST)**60 is 1.5e-6 of the distance of 9 s; that of the deviation is 60 times as much at most
    assert costs.mean(PLAIN) == pytest.approx(1, abs=1e-4) and costs.careful(PLAIN) == pytest.approx(1, abs=1e-2)


@given(st.lists(st.tuples(st.sampled_from([PLAIN, plain(300), Work(100, True, 4)]), seconds), min_size=1), works)
def test_forecasts_stay_within_what_was_measured(history: list[tuple[Work, float]], other: Work) -> None:
    costs = Costs()
    for work, measured in history:
        costs = costs.observed(work, measured)
    assert costs.careful(other) >= costs.mean(other) > 0
    for work in {work for work, _ in history}:
        own = [measured for each, measured in history if each == work]
        assert min(own) * (1 - 1e-9) <= costs.mean(work) <= max(own) * (1 + 1e-9)  # but for rounding
