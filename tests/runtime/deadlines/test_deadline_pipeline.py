"""Deadlines in the pipeline: costs are measured (with a clock of the test), saved, and used for a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_runtime import (
    CostRow,
    CostTable,
    CostUnknown,
    FlexVARPipeline,
    GenerationOutput,
    Guidance,
    InvalidInput,
    Sampling,
)
from flexvar_runtime.request import Request

BEST, GOOD, FAST = ORDER = ("1_2_3x4_6_8x10", "1_2_4_8x10", "1_8x10")
OFF = Guidance(0.0, "ramp")


@pytest.fixture(scope="module")
def bundle(ordered_bundle: Callable[[str, Sequence[str]], Path]) -> Path:
    """A bundle with a small default schedule and its own quality order."""
    return ordered_bundle(GOOD, ORDER)


@pytest.fixture
def pipe(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlexVARPipeline]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as pipeline:
        yield pipeline


def clock(*seconds: float) -> Callable[[], float]:
    """A clock by which one generation after the other takes these seconds."""
    readings = iter([reading for i, one in enumerate(seconds) for reading in (10.0 * i, 10.0 * i + one)])
    return lambda: next(readings)


def test_costs_are_measured_kept_and_chosen_by(pipe: FlexVARPipeline, bundle: Path) -> None:
    seen: list[CostRow] = []
    table = pipe.measure_costs(repeats=2, clock=clock(0.3, 0.25, 0.15, 0.2, 0.1, 0.1), on_row=seen.append)
    assert table.rows == tuple(seen)
    assert [(row.schedule, row.batch, row.guided, row.samples) for row in seen] == [(s, 1, True, 2) for s in ORDER]
    assert [row.p90 for row in seen] == pytest.approx([0.3, 0.2, 0.1])
    assert [len(row.scales) for row in seen] == [5, 4, 2] and all(s > 0 for row in seen for s in row.scales)
    assert (table.bundle, table.backend, table.threads) == (pipe.bundle.sha256, "ort-cpu", 1)
    for deadline, schedule, expected in ((1000, BEST, 0.3), (299, GOOD, 0.2), (150.5, FAST, 0.1)):
        output = pipe([3], seed=7, deadline_ms=deadline)
        assert output.choice is not None and output.choice.expected == pytest.approx(expected)
        assert str(output.choice.schedule) == str(output.settings[0].schedule) == schedule
        plain = pipe([3], schedule, seed=7)
        assert plain.choice is None and plain.settings == output.settings
        np.testing.assert_array_equal(plain.images, output.images)
    with pytest.raises(InvalidInput, match=f"{FAST}.*100.0 ms"):
        pipe([3], deadline_ms=50)
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as later:
        assert str(later.choose_schedule(1, 250).schedule) == GOOD


def test_nothing_is_chosen_by_costs_of_other_batches_or_guidance(pipe: FlexVARPipeline, bundle: Path) -> None:
    with pytest.raises(CostUnknown) as refusal:
        pipe([1, 2], deadline_ms=500)
    assert "pipe.measure_costs(batch_sizes=(2,))" in refusal.value.fix
    pipe.measure_costs((2,), repeats=1, clock=clock(0.3, 0.2, 0.1))
    assert str(pipe.choose_schedule(2, 500).schedule) == BEST
    with pytest.raises(CostUnknown, match=r"batch_sizes=\(1,\)\)"):
        pipe([1], deadline_ms=500)
    with pytest.raises(CostUnknown, match=r"guidance=Guidance\(scale=0.0, rule='ramp', max_side=16\)"):
        pipe([1, 2], guidance=OFF, deadline_ms=500)
    table = pipe.measure_costs((2,), repeats=1, guidance=OFF, clock=clock(0.03, 0.02, 0.01))
    assert pipe.choose_schedule(2, 25, OFF).expected == pytest.approx(0.02)
    assert pipe.choose_schedule(2, 500).expected == pytest.approx(0.3) and len(table.rows) == 6
    assert pipe.choose_schedule(2, 500, Guidance(4.0)).expected == pytest.approx(0.3)  # as much work as with 2.5
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=2) as other, pytest.raises(CostUnknown):
        other.choose_schedule(2, 500)


def test_a_better_schedule_that_was_not_measured_is_not_passed_over(pipe: FlexVARPipeline) -> None:
    pipe.measure_costs(schedules=[GOOD, FAST], repeats=1, clock=clock(0.2, 0.1))
    with pytest.raises(CostUnknown, match=BEST):
        pipe([1], deadline_ms=500)
    pipe.measure_costs(schedules=[BEST], repeats=1, clock=clock(0.3))
    assert str(pipe.choose_schedule(1, 250).schedule) == GOOD


def test_measurements_use_different_classes(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = FlexVARPipeline._generate

    def spy(self: FlexVARPipeline, request: Request, *arguments: Any) -> GenerationOutput:
        asked.append(request.labels)
        return real(self, request, *arguments)

    monkeypatch.setattr(FlexVARPipeline, "_generate", spy)
    pipe.measure_costs((2,), [FAST], repeats=3)
    assert asked == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_refusals(pipe: FlexVARPipeline) -> None:
    for arguments, fault in (
        ({"schedule": BEST, "deadline_ms": 100}, "schedule.*deadline_ms"),
        ({"deadline_ms": 0}, "deadline_ms is 0"),
        ({"deadline_ms": "100"}, "deadline_ms is '100'"),
    ):
        with pytest.raises(InvalidInput, match=fault):
            pipe([1], **arguments)  # type: ignore[arg-type]
    for wrong in ({"repeats": 0}, {"batch_sizes": (0,)}, {"schedules": ["2_4"]}):
        with pytest.raises(InvalidInput):
            pipe.measure_costs(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="images is 0"):
        pipe.choose_schedule(0, 100)


def test_on_scale_is_refused_where_whole_generations_are_measured(
    pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU. There, running scale by scale has other costs."""
    monkeypatch.setattr(type(pipe.generator), "runs_whole", True)
    with pytest.raises(InvalidInput, match=r"on_scale.*deadline_ms"):
        pipe([1], deadline_ms=100, on_scale=lambda step: None)


def test_on_scale_with_a_deadline_on_a_cpu(pipe: FlexVARPipeline) -> None:
    pipe.measure_costs(schedules=[BEST], repeats=1, clock=clock(0.3))
    watched: list[int] = []
    output = pipe([1], deadline_ms=400, on_scale=lambda step: watched.append(step.index))
    assert watched == [0, 1, 2, 3, 4] and output.choice is not None


def test_costs_are_kept_in_memory_where_they_cannot_be_saved(
    pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: CostTable) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CostTable, "save", full)
    assert len(pipe.measure_costs(repeats=1, clock=clock(0.3, 0.2, 0.1)).rows) == 3
    assert "No space left on device" in caplog.text and "XDG_CACHE_HOME" in caplog.text
    assert str(pipe.choose_schedule(1, 250).schedule) == GOOD
    pipe.measure_costs((2,), repeats=1, clock=clock(0.6, 0.5, 0.4))
    assert str(pipe.choose_schedule(1, 250).schedule) == GOOD and str(pipe.choose_schedule(2, 550).schedule) == GOOD


def test_costs_measured_before_an_interruption_are_kept(pipe: FlexVARPipeline, bundle: Path) -> None:
    def stop(row: CostRow) -> None:
        if row.schedule == GOOD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.measure_costs(repeats=1, clock=clock(0.3, 0.2, 0.1), on_row=stop)
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as later:
        assert str(later.choose_schedule(1, 250).schedule) == GOOD
        with pytest.raises(CostUnknown, match=FAST):
            later.choose_schedule(1, 150)


def test_two_that_measure_at_once_keep_the_costs_of_both(pipe: FlexVARPipeline, bundle: Path) -> None:
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as other:
        with pytest.raises(CostUnknown):
            other.choose_schedule(1, 250)
        pipe.measure_costs((1,), repeats=1, clock=clock(0.3, 0.2, 0.1))
        assert str(other.choose_schedule(1, 250).schedule) == GOOD  # without being opened again
        other.measure_costs((2,), repeats=1, clock=clock(0.6, 0.5, 0.4))
        pipe.measure_costs((4,), repeats=1, clock=clock(1.2, 1.1, 1.0))
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as later:
        assert [str(later.choose_schedule(n, 1150).schedule) for n in (1, 2, 4)] == [BEST, BEST, GOOD]


def test_costs_are_those_of_the_filters_that_are_asked_for(pipe: FlexVARPipeline) -> None:
    pipe.measure_costs(repeats=1, clock=clock(0.3, 0.2, 0.1))
    everything = Sampling(top_k=0, top_p=0)
    with pytest.raises(CostUnknown, match=r"batch_sizes=\(1,\), sampling=Sampling\(top_k=0, top_p=0.0"):
        pipe([1], sampling=everything, deadline_ms=500)
    pipe.measure_costs(repeats=1, sampling=everything, clock=clock(0.6, 0.5, 0.4))
    assert pipe([1], sampling=everything, deadline_ms=550).settings[0].sampling == everything
    assert str(pipe.choose_schedule(1, 550, sampling=everything).schedule) == GOOD
    assert str(pipe.choose_schedule(1, 550, sampling=Sampling(top_k=5)).schedule) == BEST  # as much work as with 900
