"""The loop on a host: memory that is bound, and inputs of every scale, seen by a backend that records them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from recording_backend import (
    DEPTH,
    MODEL,
    NULL,
    SCHEDULE,
    VOCABULARY,
    Open,
    RecordingBackend,
    address,
    check_past,
)

from flexvar_runtime import Guidance, ScaleSchedule
from flexvar_runtime.backends.base import Backend
from flexvar_runtime.generation.conditions import row_groups
from flexvar_runtime.generation.host import CLASSES_KEPT
from flexvar_runtime.model.signatures import modulation_names, new_names, past_names
from flexvar_runtime.request import Request


def test_the_recording_backend_is_a_backend() -> None:
    backend: Backend = RecordingBackend()
    assert backend.name == "recording"


# Keys and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(2.5), Guidance(0)], ids=["guided", "unguided"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_past_is_a_prefix_and_the_new_the_tail_of_one_buffer(
    open_pipeline: Open, guidance: Guidance, images: int
) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1] * images, SCHEDULE, guidance))
    sequences, tokens = images * (2 if guidance.scale else 1), ScaleSchedule.parse(SCHEDULE).tokens
    caches = [array for array in backend.arrays if array.ndim == 5]
    assert [cache.shape for cache in caches] == [(2 * DEPTH, tokens, sequences, 2, 4)]  # one allocation, all scales
    [cache] = caches
    row, past = cache.strides[1], 0
    steps = backend.runs_of("step")
    assert len(steps) == 5
    for run, (h, w) in zip(steps, ScaleSchedule.parse(SCHEDULE), strict=True):
        for i, (before, after) in enumerate(zip(past_names(DEPTH), new_names(DEPTH), strict=True)):
            old, new = run.inputs[before], run.outputs[after]
            assert old.shape == (past, sequences, 2, 4) and new.shape == (h * w, sequences, 2, 4)
            assert address(old) == address(cache[i]) and address(new) == address(cache[i]) + past * row
            assert np.shares_memory(new, cache) and (past == 0 or np.shares_memory(old, cache))
        past += h * w
    assert past == tokens


def test_the_past_holds_what_the_steps_before_wrote(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1, 2], SCHEDULE))
    check_past(backend.runs_of("step"))


def test_logits_are_written_where_they_are_read(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1, 2], SCHEDULE))
    [buffer] = [array for array in backend.arrays if array.shape == (2 * 20 * VOCABULARY,)]
    for run, (h, w) in zip(backend.runs_of("step"), ScaleSchedule.parse(SCHEDULE), strict=True):
        assert run.outputs["logits"].shape == (2, h * w, VOCABULARY)
        assert address(run.outputs["logits"]) == address(buffer)


def test_a_schedule_may_shrink(open_pipeline: Open) -> None:
    """The buffer of logits holds the largest scale, wherever it comes."""
    pipeline, backend = open_pipeline()
    steps = list(pipeline.iter_scales([1, 2], "1_4x5_2_3"))
    assert [step.tokens.shape for step in steps] == [(2, 1, 1), (2, 4, 5), (2, 2, 2), (2, 3, 3)]
    check_past(backend.runs_of("step"))
    assert [array.shape for array in backend.arrays if array.ndim == 1] == [(2 * 20 * VOCABULARY,)]


def test_nothing_large_is_copied_from_scale_to_scale(open_pipeline: Open) -> None:
    """A whole generation allocates less than the share of one block's keys, once its buffers are there."""
    schedule, labels = "1" + "_4" * 30, [1, 2, 3, 4]
    model = replace(MODEL, depth=8, width=64, heads=8, head_size=8)
    pipeline, backend = open_pipeline(model, recording=False)
    list(pipeline.iter_scales(labels, schedule))
    cache = next(array for array in backend.arrays if array.ndim == 5)
    groups = row_groups(pipeline.bundle.graph("condition"))
    kept = {(len(group.names), rows, *group.row) for group in groups for rows in (CLASSES_KEPT, 2 * len(labels))}
    large = [array for array in backend.arrays if array.nbytes > 100_000 and array.shape not in kept]
    assert len(large) == 1
    tracemalloc.start()
    try:
        list(pipeline.iter_scales(labels, schedule))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.nbytes > 15_000_000
    assert peak < cache.nbytes / 16


# Inputs of a step ----------------------------------------------------------------------------------------------------


def test_inputs_of_every_scale(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    steps = list(pipeline.iter_scales([5, 9], SCHEDULE, Guidance(2.0, "ramp", 4)))
    runs, tables = backend.runs_of("step"), pipeline.generator.tables
    for i, (run, t) in enumerate(zip(runs, [0, 0.5, 1, 1.5, 2], strict=True)):
        np.testing.assert_array_equal(run.values["t"], np.full(2, t, np.float32))
        np.testing.assert_array_equal(run.values["cond_rows"], [0, 1])
        np.testing.assert_array_equal(run.values["uncond_rows"], [2, 3])
        for k, name in enumerate((*modulation_names(DEPTH), "head_scale", "head_shift")):
            rows = np.float32([5, 9, NULL, NULL]) + np.float32(k / 10)
            np.testing.assert_allclose(run.values[name][:, 0, 0], rows, rtol=1e-6, err_msg=name)
        if i == 0:
            assert not run.values["codes"].any()
            np.testing.assert_array_equal(
                run.values["offset"][:, 0, 0], np.float32([5, 9, NULL, NULL]) + np.float32(2.0)
            )
        else:
            codes = tables.next_codes(steps[i - 1].tokens, steps[i].size)
            np.testing.assert_array_equal(run.values["codes"], np.concatenate([codes, codes]))
            np.testing.assert_array_equal(run.values["offset"], [tables.offset(*steps[i].size)] * 4)


@pytest.mark.parametrize("guidance", [Guidance(0), Guidance(1, "constant"), Guidance(0, "ramp", 1)])
def test_guidance_off_is_a_single_batch(open_pipeline: Open, guidance: Guidance) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], SCHEDULE, guidance))
    for run in backend.runs_of("step"):
        assert run.inputs["gamma1_0"].shape[0] == run.inputs["codes"].shape[0] == 2
        np.testing.assert_array_equal(run.values["uncond_rows"], [0, 1])
        np.testing.assert_array_equal(run.values["t"], [0, 0])
        np.testing.assert_array_equal(run.values["gamma1_0"][:, 0, 0], [5, 9])
    asked = np.concatenate([run.values["labels"] for run in backend.runs_of("condition")])
    assert NULL not in asked
    assert {run.outputs["new_k_0"].shape[1] for run in backend.runs_of("step")} == {2}


@pytest.mark.parametrize("guidance", [Guidance(2.5), Guidance(4, "constant"), Guidance(0, "constant")])
def test_guidance_on_is_a_double_batch(open_pipeline: Open, guidance: Guidance) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], SCHEDULE, guidance))
    assert {run.inputs["gamma1_0"].shape[0] for run in backend.runs_of("step")} == {4}


def test_the_ramp_of_one_scale_is_off(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], "1", Guidance(4)))
    assert [run.inputs["codes"].shape[0] for run in backend.runs_of("step")] == [2]


def test_given_tokens_are_recorded_by_force(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    request = Request.of([1], ScaleSchedule.parse(SCHEDULE), Guidance(2.0))
    given = [np.zeros((1, 1, 1), np.int32), np.zeros((1, 2, 2), np.int32)]
    with pipeline.generator.loop(request) as loop:
        loop.force(given)
        assert len(loop.tokens) == len(loop.times) == 2
        assert [spent.size for _, spent in loop] == [(2, 3), (3, 3), (4, 5)]
