"""Schedules: what is read, what is refused and with which words."""

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


@pytest.mark.parametrize(("name", "steps", "last", "tokens"), [("6", 6, 16, 413), ("8", 8, 16, 613), ("9", 9, 16, 629)])
def test_published_schedules(name: str, steps: int, last: int, tokens: int) -> None:
    schedule = ScaleSchedule.parse(PUBLISHED[name])
    assert (len(schedule), schedule[-1], schedule.tokens) == (steps, (last, last), tokens)


def test_published_names() -> None:
    assert PUBLISHED["10"] == "1_2_3_4_5_6_8_10_13_16" and ScaleSchedule.parse(PUBLISHED["10"]).tokens == 680
    assert PUBLISHED["13"] == "1_2_3_4_5_6_7_8_9_10_12_14_16"
    assert str(ScaleSchedule.parse("512px")) == "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32"
    assert ScaleSchedule.parse("1") == ScaleSchedule(((1, 1),))  # the side, not a number of steps


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "got schedule ''; expected sides joined by _; fix: write it like 1_2_4_8_16 or 1_2_3x5_12x20"),
        ("1_2_", "got schedule '1_2_'; expected sides joined by _"),
        ("1,2,3", "got schedule '1,2,3'"),
        ("1_2x", "got schedule '1_2x'"),
        ("1_2_-3", "got schedule '1_2_-3'"),
        ("1_2 ", "got schedule '1_2 '"),
        ("1_٣", "got schedule '1_٣'"),
        ("256px", "got schedule '256px'"),
        ("1_2.5", "got schedule '1_2.5'"),
        ("9" * 5000, "got schedule '9999"),
        ("2_4", "got a schedule with first scale 2; expected 1 as the first scale"),
        ("1x2_4", "got a schedule with first scale 1x2; expected 1 as the first scale"),
        ("1_0", "got a schedule with a scale of 0x0; expected sides from 1 to 128 tokens"),
        ("1_129", "got a schedule with a scale of 129x129"),
        ("_".join(["1"] * (MAX_SCALES + 1)), "got a schedule with 65 scales; expected 1 to 64 scales"),
        ([], "got a schedule with 0 scales"),
        (5, "got schedule 5; expected text, or sides and (h, w) pairs; fix: write it like [1, 2, (3, 5)]"),
        ([1, 2.0], "got schedule [1, 2.0]"),
        ([1, True], "got schedule [1, True]"),
        ([1, "2"], "got schedule [1, '2']"),
        ([1, (2, 3, 4)], "got schedule [1, (2, 3, 4)]"),
        ([1, None], "got schedule [1, None]"),
        ([1, 10**30], "got a schedule with a scale of 10000000"),
    ],
)
def test_refusals(value: Any, text: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        ScaleSchedule.parse(value)
    assert text in str(refusal.value)
    assert len(str(refusal.value)) < 400 and refusal.value.exit_code == 2


@pytest.mark.parametrize("scales", [((1, 1), (2.5, 2.5)), ((1, 1), 5.0), "1_2", None, ((1, 1), ("2", "2"))])
def test_the_constructor_takes_whole_sides_only(scales: Any) -> None:
    with pytest.raises(InvalidInput, match="got schedule"):
        ScaleSchedule(scales)


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


@pytest.mark.parametrize(
    ("steps", "text"), [(int(steps), text) for steps, text in PUBLISHED.items() if "px" not in steps]
)
def test_derived_schedules_are_the_published_ones(steps: int, text: str) -> None:
    assert str(ScaleSchedule.for_size((16, 16), steps)) == text
    assert str(ScaleSchedule.for_size((32, 32), 15)) == PUBLISHED["512px"]


@settings(deadline=None)
@given(h=st.integers(1, 128), w=st.integers(1, 128), steps=st.integers(2, 16))
def test_a_derived_schedule_grows_to_its_size(h: int, w: int, steps: int) -> None:
    side = math.sqrt(h * w)
    beyond = max(0, math.ceil(2 * math.log2(side / 16) - 1e-9))
    if steps <= beyond:
        with pytest.raises(InvalidInput, match=f"expected at least {beyond + 1}"):
            ScaleSchedule.for_size((h, w), steps)
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
    for size, steps, text in (((16, 16), 1, "steps 1"), ((16, 16), 17, "17 steps up to"), ((129, 4), 8, "129x4")):
        with pytest.raises(InvalidInput, match=text):
            ScaleSchedule.for_size(size, steps)
