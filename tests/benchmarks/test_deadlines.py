"""The hit rate of deadlines: draws, what counts as late, and the whole program on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from flexvar_bench.deadlines import Answer, ask, by_schedule, deadlines, main, share
from flexvar_runtime import CostRow, FlexVARPipeline, ScaleSchedule

ORDER = GOOD, FAST = "1_2_4_8", "1_8"


@pytest.fixture(scope="module")
def bundle(ordered_bundle: Callable[[str, Sequence[str]], Path]) -> Path:
    """With two small schedules."""
    return ordered_bundle(GOOD, ORDER)


def answer(schedule: str, deadline: float, expected: float, seconds: float) -> Answer:
    return Answer(deadline=deadline, schedule=schedule, expected=expected, seconds=seconds)


def test_deadlines_span_the_costs() -> None:
    drawn = deadlines([0.2, 0.05], 2000, seed=3)
    assert drawn == deadlines([0.2, 0.05], 2000, seed=3) != deadlines([0.2, 0.05], 2000, seed=4)
    assert 1.02 * 0.05 <= min(drawn) < 0.052 and 0.29 < max(drawn) <= 1.5 * 0.2
    middle = float(np.exp((np.log(1.02 * 0.05) + np.log(1.5 * 0.2)) / 2))
    assert np.median(drawn) == pytest.approx(middle, rel=0.1)  # as many below the geometric mean as above


def test_shares() -> None:
    """On time is met; late counts as a share of the deadline."""
    good = [answer(GOOD, 0.4, 0.3, 0.4), answer(GOOD, 0.4, 0.3, 0.2)]
    late = [answer(FAST, 0.1, 0.09, 0.11), answer(FAST, 0.1, 0.09, 0.15), answer(FAST, 0.1, 0.09, 0.09)]
    whole = share([*good, *late])
    assert (whole.requests, whole.met, whole.kept_to_cost) == (5, pytest.approx(0.6), pytest.approx(0.4))
    assert whole.missed_by == (pytest.approx(0.3), pytest.approx(0.5))
    order = [ScaleSchedule.parse(text) for text in (*ORDER, "1_4_8")]
    shares = by_schedule([*late, *good], order)
    assert list(shares) == [GOOD, FAST] and shares[GOOD].missed_by is None and shares[FAST].requests == 3


@pytest.fixture
def pipe(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlexVARPipeline]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as pipeline:
        yield pipeline


def test_requests_by_a_clock_of_the_test(pipe: FlexVARPipeline) -> None:
    """Costs of 0.2 and 0.1 s: what was taken is the best that fits, and what it took is the clock's."""
    readings = iter([0.0, 0.2, 1.0, 1.1])
    rows: list[CostRow] = []
    pipe.measure_costs(repeats=1, clock=lambda: next(readings), on_row=rows.append)
    times = iter([0.0, 0.25, 5.0, 5.3, 9.0, 9.2])
    answers = ask(pipe, [0.3, 0.25, 0.15], batch=1, seed=0, clock=lambda: next(times))
    assert [one.schedule for one in answers] == [GOOD, GOOD, FAST]
    assert [one.seconds for one in answers] == pytest.approx([0.25, 0.3, 0.2])
    assert [one.late > 0 for one in answers] == [False, True, True]


def test_the_whole_program(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "found.json"
    main([str(bundle), "--requests", "6", "--repeats", "2", "--threads", "1", "--json", str(file)])
    found = json.loads(file.read_text())
    assert [row["schedule"] for row in found["costs"]] == list(ORDER) and found["threads"] == 1
    assert found["all"]["requests"] == len(found["answers"]) == 6
    assert sum(one["requests"] for one in found["by_schedule"].values()) == 6
    assert "kept to" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(bundle), "--requests", "0"])
