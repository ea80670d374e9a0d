"""Two result files compared: what became slower or faster by more than the noise of the machine.

Times on shared processors are skewed, jump now and then, and neighbouring calls are alike. So medians are compared, by
the logarithm of their ratio; the error of a median comes from resampling whole blocks of neighbouring calls. Added
is what one run cannot know: by how much the next one is shifted as a whole. Other work on the machine shifts a run by
far more than that, which no statistic of two runs can tell from a change: `warnings` says where it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import ArtifactRefused

from .records import Measured, Results, Scenario

BLOCKS = 8  # a run is resampled in so many blocks of neighbours; with fewer calls than that nothing is said
RESAMPLES = 250
RUN_TO_RUN = 0.0125  # assumed: relative standard deviation of a whole run's shift where nothing else is running
RESTLESS = 0.06  # a spread of one run in a hundred of 80 calls, with the noise that the tests assume
CEILING = 0.05  # by how much a machine's ceilings may differ, relative
STUDENT = 2.145  # 95 % of Student's t with 2 x (BLOCKS - 1) degrees of freedom, both sides

SLOWER, FASTER, SAME, TOO_FEW = "slower", "faster", "same", "too few calls"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One scenario. before, after: medians in seconds; ratio: after / before, in [low, high] with 95 % confidence.

    verdict: "slower" or "faster" where 1 lies outside of these bounds, else "same"; "too few calls" with fewer than
    BLOCKS in one of the files, where the bounds are 0 and infinity.
    """

    scenario: Scenario
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str


def compare(before: Results, after: Results) -> tuple[Change, ...]:
    """Every scenario that was measured in both, in the order of `before`.

    Raises ArtifactRefused for times that are none, and for a scenario that is twice in a file.
    """
    old, new = _by_scenario(before), _by_scenario(after)
    return tuple(change(measured, new[scenario]) for scenario, measured in old.items() if scenario in new)


def unmatched(before: Results, after: Results) -> tuple[str, ...]:
    """Scenarios that were measured in one file alone, one string each. One without a time was not measured."""
    old, new = _by_scenario(before), _by_scenario(after)
    lost = tuple(f"{_name(scenario)}: only before" for scenario in old if scenario not in new)
    return lost + tuple(f"{_name(scenario)}: only after" for scenario in new if scenario not in old)


def warnings(before: Results, after: Results) -> tuple[str, ...]:
    """Why times may differ without any change of ours, one string each: another machine or software ("threads: 2
    before, 4 after"), other ceilings, and repeats that spread so far that something else was running."""
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
    """The same scenario, measured twice. Raises ArtifactRefused where a time is no positive number."""
    old, new = _seconds(before), _seconds(after)
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
    """From repeat to repeat: relative standard deviation between the medians of BLOCKS parts of a run, robust against
    a part that was disturbed. None with fewer calls than BLOCKS."""
    seconds = _seconds(measured)
    if seconds.size < BLOCKS:
        return None
    logs = np.log([np.median(part) for part in np.array_split(seconds, BLOCKS)])
    return float(1.4826 * np.median(np.abs(logs - np.median(logs))))  # of a normal distribution, 1


def _error(seconds: NDArray[np.float64]) -> float:
    """Relative standard error of the median, by resampling blocks of neighbours in a ring; always the same draws."""
    count = seconds.size
    length = count // BLOCKS
    starts = np.random.default_rng(0).integers(count, size=(RESAMPLES, math.ceil(count / length), 1))
    places = (starts + np.arange(length)).reshape(RESAMPLES, -1)[:, :count] % count
    medians = np.log(np.median(seconds[places], axis=1))
    return float(medians.std()) * math.sqrt(BLOCKS / (BLOCKS - 1))  # blocks of one run are too much alike


def _seconds(measured: Measured) -> NDArray[np.float64]:
    seconds = np.asarray(measured.seconds, np.float64)
    if seconds.size == 0 or not (np.isfinite(seconds) & (seconds > 0)).all():
        raise ArtifactRefused(
            f"{_name(measured.scenario)} with times {list(measured.seconds)[:3]}",
            expected="seconds above 0",
            fix="run the benchmark again",
        )
    return seconds


def _by_scenario(results: Results) -> dict[Scenario, Measured]:
    found: dict[Scenario, Measured] = {}
    for measured in results.measured:
        if measured.scenario in found and measured.seconds:
            raise ArtifactRefused(
                f"{_name(measured.scenario)} twice", expected="a scenario once a file", fix="run the benchmark again"
            )
        if measured.seconds:
            found[measured.scenario] = measured
    return found


def _name(scenario: Scenario) -> str:
    facts = [scenario.model, scenario.variant, scenario.precision, scenario.schedule, f"batch {scenario.batch}"]
    facts += ["guided"] * scenario.guided + [f"threads {scenario.threads}"]
    return f"{scenario.name} ({', '.join(facts)})"


def _facts(before: Results, after: Results) -> Iterator[tuple[str, object, object]]:
    """Name, before, after. The commit differs on purpose, the time always."""
    old, new = before.environment, after.environment
    for name in ("cpu", "cores", "threads", "memory_bytes", "gpu", "python"):
        yield name, getattr(old, name), getattr(new, name)
    for package in sorted(old.versions.keys() | new.versions.keys()):
        yield package, old.versions.get(package), new.versions.get(package)


def _ceilings(before: Results, after: Results) -> Iterator[tuple[str, float, float]]:
    """Name, before, after, of what was measured in both."""
    old, new = before.ceiling, after.ceiling
    yield "copied bytes/s", old.copy_bytes_per_second, new.copy_bytes_per_second
    for precision in sorted(old.flops_per_second.keys() & new.flops_per_second.keys()):
        yield f"{precision} operations/s", old.flops_per_second[precision], new.flops_per_second[precision]
