"""A deadline takes the best schedule that fits, from the order of the bundle or a default order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexvar_runtime import CostUnknown, InvalidInput, ScaleSchedule
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.deadlines.choice import choose, quality_order, seconds_of
from flexvar_runtime.model.schedule import PUBLISHED

SCHEDULES = tuple(ScaleSchedule.parse(text) for name, text in PUBLISHED.items() if name != "512px")
A, B, C = SCHEDULES[:3]

seconds = st.floats(1e-4, 10)


@given(
    st.permutations(SCHEDULES), st.lists(st.none() | seconds, min_size=len(SCHEDULES), max_size=len(SCHEDULES)), seconds
)
def test_no_worse_one_where_a_better_fits_and_none_that_does_not(
    order: list[ScaleSchedule], costs: list[float | None], deadline: float
) -> None:
    """A schedule of unknown cost might fit, so no worse one is chosen."""
    known = dict(zip(order, costs, strict=True))
    candidates = [schedule for schedule in order if known[schedule] is None or known[schedule] <= deadline]  # type: ignore[operator]
    if not candidates:
        with pytest.raises(InvalidInput) as refusal:
            choose(order, known.get, deadline)
        fastest = min(cost for cost in costs if cost is not None)
        assert type(refusal.value) is InvalidInput
        enough = int(refusal.value.expected.removeprefix("a deadline of at least ").removesuffix(" ms"))
        assert fastest * 1e3 <= enough < fastest * 1e3 + 1
        assert choose(order, known.get, enough / 1e3 + 1e-12).expected <= enough / 1e3 + 1e-12
    elif known[candidates[0]] is None:
        with pytest.raises(CostUnknown, match=f"schedule {candidates[0]} "):
            choose(order, known.get, deadline)
    else:
        choice = choose(order, known.get, deadline)
        assert choice.schedule == candidates[0]
        assert choice.expected == known[choice.schedule] and choice.expected <= deadline == choice.deadline
        assert choice.considered == tuple(zip(order, costs, strict=True))


def test_the_reason_of_a_choice() -> None:
    costs = {A: 0.2, B: 0.12, C: 0.05}
    choice = choose((A, B, C), costs.get, 0.12)
    assert all(text in choice.reason for text in ("3", "120.0 ms", str(A), "200.0 ms"))
    assert choice.to_json() == {
        "schedule": str(B),
        "expected_ms": pytest.approx(120),
        "deadline_ms": pytest.approx(120),
        "reason": choice.reason,
        "considered": [
            {"schedule": str(schedule), "expected_ms": pytest.approx(cost * 1e3)} for schedule, cost in costs.items()
        ],
    }
    assert choose((A, B), {A: 0.2}.get, 0.3).to_json()["considered"][1] == {"schedule": str(B), "expected_ms": None}
    assert "300.0 ms" in choose((A, B, C), costs.get, 0.3).reason


def test_refusals_name_the_fastest_schedule_or_the_measurement() -> None:
    with pytest.raises(InvalidInput) as refusal:
        choose((A, B), {A: 0.2, B: 0.1201}.get, 0.1)
    assert all(text in refusal.value.got for text in ("100.0 ms", str(B), "120.1 ms"))
    with pytest.raises(CostUnknown) as unknown:
        choose((A, B), {B: 0.1}.get, 0.2, measure="pipe.measure_costs(batch_sizes=(4,))")
    assert str(A) in unknown.value.got and "pipe.measure_costs(batch_sizes=(4,))" in unknown.value.fix
    assert (unknown.value.schedule, unknown.value.exit_code) == (str(A), 2)
    with pytest.raises(InvalidInput):
        choose((), {}.get, 1)


def test_a_deadline_is_a_number_above_0() -> None:
    for value in (0, -1, math.nan, math.inf, True, "100", None):
        with pytest.raises(InvalidInput, match="deadline"):
            seconds_of(value)  # type: ignore[arg-type]
    assert seconds_of(250) == 0.25


# The order -----------------------------------------------------------------------------------------------------------


def with_defaults(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, defaults=replace(manifest.defaults, **changes))


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (PUBLISHED["10"], ["10", "9", "8", "6"]),
        (PUBLISHED["6"], ["6"]),
        (PUBLISHED["13"], ["13", "12", "11", "10", "9", "8", "6"]),
        (PUBLISHED["512px"], ["512px"]),
    ],
)
def test_without_an_order_the_default_comes_first_then_shorter_published_ones(
    manifest: Manifest, default: str, expected: list[str]
) -> None:
    order = quality_order(with_defaults(manifest, schedule=default))
    assert [str(schedule) for schedule in order] == [PUBLISHED[name] for name in expected]
    assert [schedule.tokens for schedule in order] == sorted((one.tokens for one in order), reverse=True)


def test_a_default_of_ones_own(manifest: Manifest) -> None:
    assert quality_order(manifest) == (ScaleSchedule.parse("1_2_3x5"),)
    own = quality_order(with_defaults(manifest, schedule="1_4_7_16"))  # 322 tokens, fewer than any published
    assert [str(schedule) for schedule in own] == ["1_4_7_16"]


def test_the_bundles_own_order(manifest: Manifest) -> None:
    named = ("1_3x5", "1_2_3x5", "1_2_2x3_3x5")
    assert [str(schedule) for schedule in quality_order(with_defaults(manifest, quality_order=named))] == list(named)
