"""The two published rules, by hand; and that the reference has the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flexvar_ref.sampling import guidance_weight
from flexvar_runtime import Guidance, InvalidInput, ScaleSchedule
from flexvar_runtime.model.guidance import MAX_SCALE
from flexvar_runtime.model.schedule import PUBLISHED


def weights(schedule: str, *options: Any) -> list[float]:
    return list(Guidance(*options).weights(ScaleSchedule.parse(schedule)))


def test_ramp_at_ten_steps() -> None:
    assert weights(PUBLISHED["10"], 2.5) == pytest.approx([2.5 * i / 9 for i in range(10)], rel=1e-12)


def test_ramp_below_ten_steps_ends_at_the_scale() -> None:
    assert weights("1_2_4_8", 3) == pytest.approx([0, 1, 2, 3], rel=1e-12)


def test_ramp_beyond_ten_steps_exceeds_the_scale() -> None:
    t = weights(PUBLISHED["13"], 2.25)
    assert t == pytest.approx([0.25 * i for i in range(13)], rel=1e-12)
    assert t[12] == pytest.approx(3.0)


def test_ramp_above_the_largest_side_is_the_scale() -> None:
    t = weights("512px", 3.0)
    assert t[-2:] == [3.0, 3.0]  # sides 23 and 32
    assert t[12] == pytest.approx(3.0 * 12 / 9)  # side 16: the ramp, beyond its scale
    assert weights("1_2x17_5x8_16x16", 3.0) == pytest.approx([0, 3, 2, 3])  # one side suffices
    assert weights("1_2_3_4", 3.0, "ramp", 2) == pytest.approx([0, 1, 3, 3])
    assert weights("1_2_3_4", 3.0, "ramp", 1) == pytest.approx([0, 3, 3, 3])


def test_constant() -> None:
    assert weights(PUBLISHED["13"], 4.0, "constant") == [3.0] * 13
    assert weights("1_2_32", 0.0, "constant") == [-1.0] * 3  # the unconditional prediction
    assert weights("1", 4.0, "constant") == [3.0]


def test_a_single_scale_has_no_ramp() -> None:
    assert weights("1", 4.0) == [0.0]
    assert weights("1", 4.0, "ramp", 1) == [0.0]


def test_off() -> None:
    for scale, rule in ((0, "ramp"), (1, "constant")):
        assert weights("512px", scale, rule) == [0.0] * 15
        assert not Guidance(scale, rule).acts(ScaleSchedule.parse("512px"))


@pytest.mark.parametrize("rule", ["ramp", "constant"])
def test_the_reference_has_the_same_weights(rule: str) -> None:
    for schedule in (*PUBLISHED.values(), "1", "1_2x3_17x2_12x20"):
        for max_side in (16, 3):
            parsed = ScaleSchedule.parse(schedule)
            expected = [guidance_weight(rule, 2.5, i, len(parsed), size, max_side) for i, size in enumerate(parsed)]
            assert weights(schedule, 2.5, rule, max_side) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            ("guidance scale", {"scale": bad})
            for bad in (math.nan, math.inf, -0.1, MAX_SCALE + 1, 10**400, True, "2.5")
        ),
        *(("guidance rule", {"rule": bad}) for bad in ("linear", None)),
        *(("max_side", {"max_side": bad}) for bad in (0, 16.0)),
    ],
)
def test_refusals(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=name) as refusal:
        Guidance(**options)
    assert repr(*options.values())[:80] in refusal.value.got and refusal.value.exit_code == 2


def test_numbers_of_numpy_are_numbers() -> None:
    for scale in (3, 3.0, np.float64(3), np.float32(3), np.int64(3)):
        guidance = Guidance(scale)
        assert guidance == Guidance(3.0) and type(guidance.scale) is float
    assert guidance.to_json() == {"scale": 3.0, "rule": "ramp", "max_side": 16}
