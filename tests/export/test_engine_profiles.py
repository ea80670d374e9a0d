"""The profiles of an engine serve every size of the schedules, and other schedules too."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from flexvar_export.engine_profiles import profiles, step_pairs
from flexvar_runtime import ScaleSchedule
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.schedule import PUBLISHED

TEN_STEPS = [ScaleSchedule.parse(PUBLISHED["10"])]
SMALL = [ScaleSchedule.parse("1_2x3")]
ALL = [ScaleSchedule.parse(text) for text in PUBLISHED.values()]
D16 = ModelFacts.published(16)


def test_pairs_of_the_published_schedules() -> None:
    """44 distinct shapes serve all published schedules, 512 px included."""
    assert len(step_pairs(ALL)) == 44
    assert step_pairs(TEN_STEPS)[-1] == (256, 424)
    assert step_pairs(SMALL) == [(1, 0), (6, 1)]


@pytest.mark.parametrize("schedules", [TEN_STEPS, SMALL, ALL, [ScaleSchedule.parse("1")]])
def test_step_profiles_serve_every_scale_of_the_schedules(schedules: list[ScaleSchedule]) -> None:
    found = profiles("step", schedules, 4, D16)
    assert len(found) == len(step_pairs(schedules)) + 1
    for new, past in step_pairs(schedules):
        for images, branches in itertools.product((1, 3, 4), (1, 2)):
            sizes = {"new": new, "past": past, "images": images, "sequences": images * branches}
            first = next(profile for profile in found if profile.covers(sizes))
            assert first.axes["new"] == (new,) * 3 and first.axes["past"] == (past,) * 3  # the exact profile
            assert found[-1].covers(sizes)
        assert not any(one.covers({"new": new, "past": past, "images": 5, "sequences": 5}) for one in found)


def test_a_model_with_few_heads_has_no_profile_for_exactly_one_query() -> None:
    """TensorRT-RTX has a kernel for one to two queries, but none for exactly one."""
    tiny = replace(D16, depth=2, heads=2, width=128)
    first, second, *_ = profiles("step", TEN_STEPS, 1, tiny)
    assert (first.axes["new"], first.axes["past"]) == ((1, 1, 2), (0, 0, 0))
    assert second.axes["new"] == (4, 4, 4) and profiles("step", TEN_STEPS, 1, D16)[0].axes["new"] == (1, 1, 1)


def test_the_wide_profile_serves_other_schedules() -> None:
    wide = profiles("step", TEN_STEPS, 1, D16)[-1]
    one = {"images": 1, "sequences": 2}
    for new, past in step_pairs([ScaleSchedule.parse(text) for text in ("1_2_4_6_10_16", "1_4x5_9x7_16x12")]):
        assert wide.covers({"new": new, "past": past, **one})
    assert not wide.covers({"new": 257, "past": 0, **one})


def test_profiles_of_the_other_graphs() -> None:
    [labels] = profiles("condition", ALL, 64, D16)
    assert labels.axes == {"labels": (16, 16, 16)}
    schedules = [*TEN_STEPS, ScaleSchedule.parse("1_2_12x20")]
    for graph in ("decode", "encode"):
        *exact, wide = profiles(graph, schedules, 64, D16)
        assert [profile.axes["height"] for profile in exact] == [(12, 12, 12), (16, 16, 16)]
        assert {profile.axes["images"] for profile in (*exact, wide)} == {(1, 1, 8)}  # larger batches are run in parts
        assert wide.covers({"images": 8, "height": 20, "width": 1}) and wide.axes["height"][2] == 20
    assert profiles("decode", schedules, 3, D16)[0].axes["images"] == (1, 1, 3)
