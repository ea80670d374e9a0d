"""Schedules: every way to write one, what is refused, and the schedules of any size."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexvar_runtime
from flexvar_runtime import InvalidInput, ScaleSchedule
from flexvar_runtime.model.schedule import MAX_SCALES, MAX_SIDE, PUBLISHED


@pytest.mark.parametrize(
    "value",
    [
        "1_2_3x5_12x20",
        [1, 2, (3, 5), (12, 20)],
        (1, 2, [3, 5], (12, 20)),
        iter([1, 2, (3, 5), (12, 20)]),
        [np.int32(1), np.int64(2), (np.int8(3), 5), (12, 20)],
        ScaleSchedule(((1, 1), (2, 2), (3, 5), (12, 20))),
    ],
)
def test_every_way_to_write_a_schedule(value: Any) -> None:
    schedule = ScaleSchedule.parse(value)
    assert schedule.scales == ((1, 1), (2, 2), (3, 5), (12, 20))
    assert all(type(side) is int for scale in schedule for side in scale)
    assert str(schedule) == "1_2_3x5_12x20"
    assert (len(schedule), schedule.tokens, schedule.largest, schedule[2]) == (4, 260, 240, (3, 5))


def test_a_schedule_is_a_value() -> None:
    schedule = ScaleSchedule.parse("1_2_3x5")
    assert ScaleSchedule.parse(schedule) is schedule
    assert {schedule: "found"}[ScaleSchedule.parse([1, 2, (3, 5)])] == "found"
    assert flexvar_runtime.ScaleSchedule is ScaleSchedule


def test_published_schedules() -> None:
    for steps, tokens in ((6, 413), (8, 613), (9, 629), (11, 767), (12, 900), (14, 1102)):
        schedule = ScaleSchedule.parse(PUBLISHED[str(steps)])
        assert (len(schedule), schedule[-1], schedule.tokens) == (steps, (16, 16), tokens)
    assert PUBLISHED["10"] == "1_2_3_4_5_6_8_10_13_16" and ScaleSchedule.parse(PUBLISHED["10"]).tokens == 680
    assert PUBLISHED["11"] == "1_2_3_4_5_6_7_9_11_13_16"
    assert PUBLISHED["12"] == "1_2_3_4_5_6_7_8_10_12_14_16"
    assert PUBLISHED["13"] == "1_2_3_4_5_6_7_8_9_10_12_14_16"
    assert PUBLISHED["14"] == "1_2_3_4_5_6_7_8_9_10_11_12_14_16"
    assert str(ScaleSchedule.parse("512px")) == "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32"
    assert ScaleSchedule.parse("1") == ScaleSchedule(((1, 1),))  # the side, not a number of steps


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("1_2_", "1_2_"),
        ("1_2_-3", "1_2_-3"),
        ("1_٣", "1_٣"),  # a digit, but not of ASCII
        ("256px", "256px"),
        ("9" * 5000, "9999"),
        ("1x2_4", "1x2"),
        ("1_0", "0x0"),
        ("1_129", "129x129"),
        ([1, 10**30], "10000000"),
        ("_".join(["1"] * (MAX_SCALES + 1)), "more than 64 scales"),
        ([], "no scales"),
        (5, "5"),
        ([1, 2.0], "2.0"),
        ([1, True], "True"),
        ([1, "2"], "'2'"),
        ([1, (2, 3, 4)], "(2, 3, 4)"),
    ],
)
def test_refusals(value: Any, named: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        ScaleSchedule.parse(value)
    assert refusal.value.got.startswith("schedule ") and named in refusal.value.got
    assert len(str(refusal.value)) < 400 and refusal.value.exit_code == 2


def test_the_constructor_takes_whole_sides_only() -> None:
    for scales in (((1, 1), (2.5, 2.5)), ((1, 1), 5.0), "1_2", None, ((1, 1), ("2", "2"))):
        with pytest.raises(InvalidInput, match=r"^schedule "):
            ScaleSchedule(scales)  # type: ignore[arg-type]


def test_the_limits_are_allowed() -> None:
    assert len(ScaleSchedule(((1, 1),) * MAX_SCALES)) == MAX_SCALES
    assert ScaleSchedule.parse(f"1_{MAX_SIDE}").largest == MAX_SIDE**2
    assert str(ScaleSchedule.parse("1_8_2x3_8x2")) == "1_8_2x3_8x2"  # sizes may shrink


sides = st.integers(1, MAX_SIDE)
maps = st.lists(st.tuples(sides, sides), max_size=12)


@given(maps)
def test_text_and_back(sizes: list[tuple[int, int]]) -> None:
    schedule = ScaleSchedule(((1, 1), *sizes))
    assert schedule.largest == max(h * w for h, w in schedule)
    assert ScaleSchedule.parse(str(schedule)) == schedule == ScaleSchedule.parse(list(schedule))
    assert schedule.tokens == 1 + sum(h * w for h, w in sizes)


def test_derived_schedules_are_the_published_ones() -> None:
    for steps, text in PUBLISHED.items():
        if steps != "512px":
            assert str(ScaleSchedule.for_size((16, 16), int(steps))) == text
    assert str(ScaleSchedule.for_size((32, 32), 15)) == PUBLISHED["512px"]


@settings(deadline=None)
@given(h=st.integers(1, 128), w=st.integers(1, 128), steps=st.integers(2, 16))
def test_a_derived_schedule_grows_to_its_size(h: int, w: int, steps: int) -> None:
    side = math.sqrt(h * w)
    beyond = max(0, math.ceil(2 * math.log2(side / 16) - 1e-9))
    if steps <= beyond:
        with pytest.raises(InvalidInput, match=r"^steps ") as refusal:
            ScaleSchedule.for_size((h, w), steps)
        assert refusal.value.expected == f"at least {beyond + 1}"
        return
    schedule = ScaleSchedule.for_size((h, w), steps)
    assert schedule[0] == (1, 1) and schedule[-1] == (h, w) and len(schedule) <= steps
    assert len(set(schedule.scales)) == len(schedule)
    if min(h, w) >= 16:
        assert len(schedule) == steps
    for (a, b), (c, d) in pairwise(schedule.scales):
        assert a <= c and b <= d
    mirrored = ScaleSchedule.for_size((w, h), steps)
    assert mirrored.scales == tuple((b, a) for a, b in schedule.scales)


def test_what_cannot_be_derived() -> None:
    assert str(ScaleSchedule.for_size((1, 1), 1)) == "1"
    for size, steps, text in (((16, 16), 1, "steps is 1"), ((16, 16), 17, "steps .*17"), ((129, 4), 8, "129x4")):
        with pytest.raises(InvalidInput, match=text):
            ScaleSchedule.for_size(size, steps)
