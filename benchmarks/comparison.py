"""Compares two files of results: what became slower or faster by more than the noise of the machine.

Times on shared processors are skewed and jump at times, and neighbouring calls are alike. Medians are therefore
compared, by the logarithm of their ratio. The error of a median comes from resampling whole blocks of neighbouring
calls. An assumed shift between two runs is added, because one run cannot show it. Other work on the machine shifts a
run by far more. Two runs cannot tell such a shift from a change, but `warnings` names its signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import ArtifactRefused

from .records import Measured, Results, Scenario

BLOCKS = 8  # of neighbouring calls, which are resampled. Fewer calls give no verdict
RESAMPLES = 250
RUN_TO_RUN = 0.0125  # assumed relative standard deviation of the shift of a run on an idle machine
RESTLESS = 0.06  # with the noise of the tests, one run of 80 calls in a hundred spreads more
CEILING = 0.05  # largest relative difference of the measured limits of one machine
STUDENT = 2.145  # two-sided 95 % quantile of Student's t with 2 x (BLOCKS - 1) degrees of freedom

SLOWER, FASTER, SAME, TOO_FEW = "slower", "faster", "same", "too few calls"


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one scenario.

    before, after: medians in seconds. ratio: after / before. low, high: its bounds with 95 % confidence. verdict:
    "slower" or "faster" if 1 lies outside the bounds, else "same". With fewer than BLOCKS calls in a file the verdict
    is "too few calls" and the bounds are 0 and infinity.
    """

    scenario: Scenario
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


def compare(before: Results, after: Results) -> tuple[Change, ...]:
    """The changes of all scenarios that both files hold, in the order of `before`.

    Raises ArtifactRefused for a scenario that a file holds twice.
    """
    old, new = _by_scenario(before), _by_scenario(after)
    return tuple(change(measured, new[scenario]) for scenario, measured in old.items() if scenario in new)


def unmatched(before: Results, after: Results) -> tuple[str, ...]:
    """One line for each scenario that only one file holds with times."""
    old, new = _by_scenario(before), _by_scenario(after)
    lost = tuple(f"{_name(scenario)}: only before" for scenario in old if scenario not in new)
    return lost + tuple(f"{_name(scenario)}: only after" for scenario in new if scenario not in old)


def warnings(before: Results, after: Results) -> tuple[str, ...]:
    """One line for each reason why times may differ without a change of the code.

    Reasons are another machine or software ("threads: 2 before, 4 after"), other measured limits, and calls that spread
    so much that other work must have been running.
    """
    found = [f"{name}: {old} before, {new} after" for name, old, new in _facts(before, after) if old != new]
    for name, old, new in _ceilings(before, after):
        if abs(math.log(new / old)) > CEILING:
            found.append(f"{name}: {old:.3g} before, {new:.3g} after")
    for results, when in ((before, "before"), (after, "after")):
        for scenario, measured in _by_scenario(results).items():
            if (apart := spread(measured) or 0) > RESTLESS:
                found.append(f"{_name(scenario)}: repeats spread by {apart:.0%} {when}")
    return tuple(found)


def change(before: Measured, after: Measured) -> Change:
    """The change of a scenario that was measured twice."""
    old, new = np.asarray(before.seconds, np.float64), np.asarray(after.seconds, np.float64)
    medians = float(np.median(old)), float(np.median(new))
    ratio, reach = medians[1] / medians[0], math.inf
    if min(old.size, new.size) >= BLOCKS:
        reach = STUDENT * math.hypot(_error(old), _error(new), RUN_TO_RUN, RUN_TO_RUN)
    low, high = ratio * math.exp(-reach), ratio * math.exp(reach)
    verdict = TOO_FEW if math.isinf(reach) else SLOWER if low > 1 else FASTER if high < 1 else SAME
    return Change(
        scenario=after.scenario,
        before=medians[0],
        after=medians[1],
        ratio=ratio,
        low=low,
        high=high,
        verdict=verdict,
    )


def spread(measured: Measured) -> float | None:
    """The relative standard deviation between the medians of BLOCKS parts of a run, robust against a disturbed part.

    None with fewer calls than BLOCKS.
    """
    seconds = np.asarray(measured.seconds, np.float64)
    if seconds.size < BLOCKS:
        return None
    logs = np.log([np.median(part) for part in np.array_split(seconds, BLOCKS)])
    return float(
        1.4826 * np.median(np.abs(logs - np.median(logs)))
    )  # 1.4826 makes it the standard deviation of a normal distribution


def _error(seconds: NDArray[np.float64]) -> float:
    """Relative standard error of the median, by resampling blocks of neighbours in a ring, with a fixed seed."""
    count = seconds.size
    length = count // BLOCKS
    starts = np.random.default_rng(0).integers(count, size=(RESAMPLES, math.ceil(count / length), 1))
    places = (starts + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    medians = np.log(np.median(seconds[places], axis=1))
    return float(medians.std()) * math.sqrt(
        BLOCKS / (BLOCKS - 1)
    )  # corrects for the similarity of the blocks of one run


def _by_scenario(results: Results) -> dict[Scenario, Measured]:
    found: dict[Scenario, Measured] = {}
    for measured in results.measured:
        if measured.scenario in found and measured.seconds:
            raise ArtifactRefused(
                f"A file of results holds {_name(measured.scenario)} twice.",
                expected="each scenario once",
                fix="Run the benchmark again.",
            )
        if measured.seconds:
            found[measured.scenario] = measured
    return found


def _name(scenario: Scenario) -> str:
    facts = [scenario.model, scenario.variant, scenario.precision, scenario.schedule, f"batch {scenario.batch}"]
    facts += ["guided"] * scenario.guided + [f"threads {scenario.threads}"]
    return f"{scenario.name} ({', '.join(facts)})"


def _facts(before: Results, after: Results) -> Iterator[tuple[str, object, object]]:
    """Name, value before and value after of each fact. Commit and time are left out, because they differ anyway."""
    old, new = before.environment, after.environment
    for name in ("cpu", "cores", "threads", "memory_bytes", "gpu", "python"):
        yield name, getattr(old, name), getattr(new, name)
    for package in sorted(old.versions.keys() | new.versions.keys()):
        yield package, old.versions.get(package), new.versions.get(package)


def _ceilings(before: Results, after: Results) -> Iterator[tuple[str, float, float]]:
    """Name, rate before and rate after of each limit that both files hold."""
    old, new = before.ceiling, after.ceiling
    yield "copied bytes/s", old.copy_bytes_per_second, new.copy_bytes_per_second
    for precision in sorted(old.flops_per_second.keys() & new.flops_per_second.keys()):
        yield f"{precision} operations/s", old.flops_per_second[precision], new.flops_per_second[precision]
