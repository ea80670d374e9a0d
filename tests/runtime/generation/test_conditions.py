"""The conditions of classes: when their graph is opened and run, and which classes are kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from recording_backend import NULL, SCHEDULE, Array, Open, RecordingBackend, RecordingGraph

from flexvar_runtime import Guidance, OutOfMemory
from flexvar_runtime.generation import conditions
from flexvar_runtime.generation.host import CLASSES_KEPT


def test_the_condition_graph_is_closed_before_the_first_step(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    steps = pipeline.iter_scales([1, 2, 1], SCHEDULE)
    assert not backend.graphs  # nothing is opened before it is needed
    next(steps)
    [condition] = backend.opened("condition")
    assert condition.once and condition.closed
    [step] = backend.opened("step")
    assert not step.once and not step.closed


def test_a_class_is_asked_for_once(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    pipeline([1, 2, 1], SCHEDULE)
    pipeline([2, 1], SCHEDULE)
    assert len(backend.opened("condition")) == 1
    pipeline([2, 3], SCHEDULE)
    asked = [run.values["labels"].tolist() for run in backend.runs_of("condition")]
    assert asked == [[1, 2], [NULL, NULL], [3, NULL]]
    assert all(graph.closed for graph in backend.opened("condition"))


def test_a_class_is_always_run_in_a_batch_of_the_same_size(open_pipeline: Open) -> None:
    """So that a label's row cannot depend on how many it was asked with."""
    pipeline, backend = open_pipeline()
    pipeline(list(range(7)), SCHEDULE, Guidance(0))
    pipeline([20], SCHEDULE, Guidance(0))
    assert {run.inputs["labels"].shape for run in backend.runs_of("condition")} == {(backend.labels_per_run,)}


def asked(backend: RecordingBackend, first_run: int) -> list[int]:
    """The classes of the runs of the condition graph from `first_run` on."""
    return sorted(label for run in backend.runs_of("condition")[first_run:] for label in run.values["labels"])


def test_more_classes_than_are_remembered(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    labels = [*range(CLASSES_KEPT + 8)]
    pipeline(labels, "1_2", Guidance(0))
    [first, _] = backend.runs_of("step")
    np.testing.assert_array_equal(first.values["gamma1_0"][:, 0, 0], labels)
    runs = len(backend.runs_of("condition"))
    for again in ([0, 1], [1, 0], labels[2:], labels):
        pipeline(again, "1_2", Guidance(0))
    assert asked(backend, runs) == []  # the larger request made room, and nothing was forgotten
    pipeline([50, 51], "1_2", Guidance(0))
    pipeline(labels[2:], "1_2", Guidance(0))
    assert asked(backend, runs) == [50, 51]  # they took the slots of 0 and 1, which were unused longest
    pipeline([1, 0], "1_2", Guidance(0))
    assert asked(backend, runs) == [0, 1, 50, 51]


def test_a_large_request_gives_its_slots_back(open_pipeline: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "MOST_GROWTH", 1)
    pipeline, backend = open_pipeline()
    labels = [*range(CLASSES_KEPT + 8)]
    pipeline(labels, "1_2", Guidance(0))
    runs = len(backend.runs_of("condition"))
    for again in ([0, 1], [1, 0], labels[2:CLASSES_KEPT]):
        pipeline(again, "1_2", Guidance(0))
    assert asked(backend, runs) == labels[:CLASSES_KEPT]  # computed once more, into as many slots as are kept


def test_the_condition_graph_is_closed_after_a_failure(open_pipeline: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemory("it", expected="less", fix="wait")

    pipeline, backend = open_pipeline()
    with monkeypatch.context() as patch:
        patch.setattr(RecordingGraph, "run", fail)
        with pytest.raises(OutOfMemory):
            pipeline([1], SCHEDULE)
    assert [graph.closed for graph in backend.graphs] == [True]
    pipeline([1], SCHEDULE)


@pytest.mark.parametrize("failing", range(1, 7))
def test_after_a_failed_allocation_the_call_can_be_made_again(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """A call allocates six arrays: conditions, their rows and the buffers of the loop."""
    pipeline, backend = open_pipeline()
    empty, calls = RecordingBackend.empty, itertools.count(1)

    def none_left(self: RecordingBackend, shape: tuple[int, ...], dtype: str) -> Array:
        if next(calls) == failing:
            raise OutOfMemory("it", expected="less", fix="wait")
        return empty(self, shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(RecordingBackend, "empty", none_left)
        with pytest.raises(OutOfMemory):
            pipeline([1], SCHEDULE)
    backend.runs.clear()
    pipeline([1], SCHEDULE)
    first = backend.runs_of("step")[0]
    np.testing.assert_array_equal(first.values["gamma1_0"][:, 0, 0], [1, NULL])
