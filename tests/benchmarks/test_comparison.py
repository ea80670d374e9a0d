"""Changes beyond the noise are found, and noise alone is not taken for one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_bench.comparison import BLOCKS, Change, change, compare, spread, unmatched, warnings
from flexvar_bench.records import Ceiling, Environment, Measured, Results, Scenario
from flexvar_runtime.errors import ArtifactRefused

CALLS, DRAWS = 80, 400
HERE = Environment(
    cpu="one",
    cores=2,
    threads=2,
    memory_bytes=8 << 30,
    gpu=None,
    python="3.11.2",
    versions={"numpy": "2.1.0", "onnxruntime": "1.24.0"},
    commit="a",
    started="2026-01-01T00:00:00Z",
)
SCENARIO = Scenario(
    name="latency",
    model="tiny",
    variant="ort-cpu",
    precision="float32",
    schedule="1_2_3",
    batch=1,
    guided=True,
    threads=2,
)


def measured(seconds: Sequence[float] | NDArray[np.float64], scenario: Scenario = SCENARIO) -> Measured:
    return Measured(
        scenario=scenario,
        bundle_sha256=None,
        seconds=tuple(float(second) for second in seconds),
        turns=tuple(range(len(seconds))),
        condition=None,
        scales=None,
        sampling=None,
        decode=None,
        peak_memory_bytes=None,
        flops=None,
        joules=None,
        note="",
    )


def results(*found: Measured) -> Results:
    return Results(HERE, Ceiling(copy_bytes_per_second=1e10, flops_per_second={"float32": 1e11}), found, (), ())


def runs(seed: int, count: int, calls: int = CALLS) -> NDArray[np.float64]:
    """Seconds (count, calls) of calls that take 0.1 s, as two shared virtual cores give them.

    Lognormal jitter of 5 %, half of it handed on from call to call (AR(1), 0.5); a drift of ± 2 % whose period is a
    quarter of a run to two runs; 5 to 10 % of the calls take 1.5 to 3 times as long; a whole run is shifted by 1 %.
    """
    rng = np.random.default_rng(seed)
    jitter = rng.standard_normal((count, calls))
    for i in range(1, calls):
        jitter[:, i] = 0.5 * jitter[:, i - 1] + math.sqrt(0.75) * jitter[:, i]
    phase, period = rng.uniform(0, 2 * np.pi, (count, 1)), rng.uniform(0.25, 2, (count, 1))
    drift = np.sin(phase + 2 * np.pi * np.arange(calls) / calls / period)
    spikes = np.where(
        rng.random((count, calls)) < rng.uniform(0.05, 0.1, (count, 1)), rng.uniform(1.5, 3, (count, calls)), 1
    )
    shift = rng.standard_normal((count, 1))
    return 0.1 * spikes * np.exp(0.05 * jitter + 0.02 * drift + 0.01 * shift)


def verdicts(seed: int, factor: float) -> Counter[str]:
    """Of DRAWS pairs of runs, the second `factor` times as slow."""
    before, after = np.split(runs(seed, 2 * DRAWS), 2)
    return Counter(
        change(measured(old), measured(factor * new)).verdict for old, new in zip(before, after, strict=True)
    )


def test_a_tenth_slower_is_flagged() -> None:
    assert verdicts(1, 1.1)["slower"] >= 0.95 * DRAWS


def test_no_change_is_not_flagged() -> None:
    assert verdicts(2, 1)["same"] >= 0.95 * DRAWS


def test_bounds_and_ratio() -> None:
    before, after = runs(3, 2)
    found, back = change(measured(before), measured(1.3 * after)), change(measured(1.3 * after), measured(before))
    assert (found.before, found.after) == (np.median(before), np.median(1.3 * after))
    assert found.ratio == found.after / found.before and 1 < found.low < found.ratio < found.high
    assert (found.verdict, back.verdict) == ("slower", "faster")
    assert (back.ratio, back.low, back.high) == pytest.approx((1 / found.ratio, 1 / found.high, 1 / found.low))
    assert change(measured(before), measured(1.3 * after)) == found, "the draws are always the same"


def test_a_run_shifted_as_a_whole_is_no_change_however_steady() -> None:
    """Between runs of the same program a percent or two is nothing, though neither run varies at all."""
    steady = np.full(CALLS, 0.1)
    assert change(measured(steady), measured(1.02 * steady)).verdict == "same"
    assert change(measured(steady), measured(1.05 * steady)).verdict == "slower"


def test_neighbours_that_are_alike_count_for_less() -> None:
    """The same times, in any order and in order: a drift says less about the next run than independent calls."""
    drifting = np.linspace(0.1, 0.13, CALLS)
    mixed = np.random.default_rng(0).permutation(drifting)
    known, unknown = change(measured(mixed), measured(mixed)), change(measured(drifting), measured(drifting))
    assert math.log(unknown.high) > 1.5 * math.log(known.high)


@pytest.mark.parametrize(("old", "new"), [(BLOCKS - 1, CALLS), (CALLS, BLOCKS - 1), (1, 1)])
def test_too_few_calls_for_an_opinion(old: int, new: int) -> None:
    found = change(measured(np.full(old, 0.1)), measured(np.full(new, 0.9)))
    assert (found.verdict, found.low, found.high) == ("too few calls", 0, math.inf)
    assert found.ratio == pytest.approx(9)


def test_just_enough_calls() -> None:
    assert change(measured([0.1] * BLOCKS), measured([0.2] * (BLOCKS + 1))).verdict == "slower"


def test_the_spread_from_repeat_to_repeat() -> None:
    """One part of eight that was disturbed does not count, an even spread does, and the unit does not matter."""
    steady = np.full(CALLS, 0.1)
    disturbed = np.where(np.arange(CALLS) < CALLS // BLOCKS, 2, 1) * steady
    assert spread(measured(steady)) == spread(measured(disturbed)) == 0
    levels = np.exp(0.03 * np.random.default_rng(0).standard_normal((200, BLOCKS))).repeat(CALLS // BLOCKS, axis=1)
    assert np.mean([spread(measured(run)) for run in levels]) == pytest.approx(0.03, rel=0.15)
    assert spread(measured(7 * levels[0])) == pytest.approx(spread(measured(levels[0])))
    assert spread(measured(steady[: BLOCKS - 1])) is None


def test_files_are_matched_by_scenario() -> None:
    one, two, three, four = (replace(SCENARIO, batch=batch) for batch in (1, 2, 3, 4))
    steady = [0.1] * 10
    before = results(measured(steady, one), measured(steady, two), measured([], four), measured(steady, three))
    after = results(measured([0.2] * 10, three), measured(steady, one), measured(steady, four))
    found = compare(before, after)
    assert [(change.scenario, change.verdict) for change in found] == [(one, "same"), (three, "slower")]
    assert all(isinstance(change, Change) for change in found)
    assert unmatched(before, after) == (
        "latency (tiny, ort-cpu, float32, 1_2_3, batch 2, guided, threads 2): only before",
        "latency (tiny, ort-cpu, float32, 1_2_3, batch 4, guided, threads 2): only after",
    ), "what has no times was not measured"
    assert compare(before, results()) == ()


def test_warnings_of_another_environment() -> None:
    before, later = results(), replace(HERE, commit="b", started="2026-02-02T00:00:00Z")
    assert warnings(before, replace(before, environment=later)) == ()
    other = replace(HERE, cpu="two", threads=4, gpu="H200", versions={"numpy": "2.2.0", "torch": "2.10.0"})
    assert warnings(before, replace(before, environment=other)) == (
        "cpu: one before, two after",
        "threads: 2 before, 4 after",
        "gpu: None before, H200 after",
        "numpy: 2.1.0 before, 2.2.0 after",
        "onnxruntime: 1.24.0 before, None after",
        "torch: None before, 2.10.0 after",
    )


def test_warnings_of_a_machine_that_was_busy() -> None:
    quiet = results(measured(runs(4, 1)[0]))
    slow = Ceiling(copy_bytes_per_second=0.98e10, flops_per_second={"float32": 0.7e11, "float16": 1e11})
    busy = replace(results(measured(np.linspace(0.1, 0.15, CALLS))), ceiling=slow)
    assert warnings(quiet, quiet) == ()
    assert warnings(quiet, busy) == (
        "float32 operations/s: 1e+11 before, 7e+10 after",
        "latency (tiny, ort-cpu, float32, 1_2_3, batch 1, guided, threads 2): repeats spread by 15% after",
    )


@pytest.mark.parametrize("seconds", [[0.1, 0.0], [0.1, -1.0], [math.nan], [math.inf]])
def test_times_that_are_none(seconds: list[float]) -> None:
    with pytest.raises(ArtifactRefused, match="seconds"):
        measured(seconds)


def test_a_scenario_that_is_twice_in_a_file() -> None:
    twice = results(measured([0.1] * 10), measured([0.2] * 10))
    for pair in ((twice, results()), (results(), twice)):
        with pytest.raises(ArtifactRefused, match=r"latency \(tiny, ort-cpu, "):
            compare(*pair)
