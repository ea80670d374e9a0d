"""The work of a run as values: the model, the variants, the schedules, the batches and the repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from flexvar_export.quality import read_quality as rated_schedules
from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.schedule import PUBLISHED

from .records import Quality
from .variants import TORCH_PEERS, VARIANTS, CostWork, Work

STEPS = {4: "1_3_8_16", 5: "1_2_5_10_16", 7: "1_2_3_5_8_13_16", **{n: PUBLISHED[str(n)] for n in (6, 8, 9, 10)}}
"""Schedules by number of steps: those of the paper, and ours for numbers that it lacks."""
LEAST = 3  # turns that are made even if the time is up
MAX_BATCH, MAX_REPEATS, MAX_REQUESTS = 1024, 10_000, 100_000  # more is surely a mistake
COST_REPEATS = 10  # the 90 % quantile of costs needs as many


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle and its checkpoint, which the torch peers need. weights: "ema" or "model" if it holds both."""

    name: str
    bundle: Path
    transformer: Path | None = None
    vae: Path | None = None
    weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a model is measured.

    repeats: counted calls of each variant. seconds: no new turn begins later, but LEAST turns are made. requests: of
    each load test, 0 for none. costs: batch sizes to measure for deadlines, None for those of `batches`.
    """

    variants: tuple[str, ...] = ("ort-cpu",)
    steps: tuple[int, ...] = (10, 8, 6, 4)
    batches: tuple[int, ...] = (1, 2)
    repeats: int = 7
    seconds: float = math.inf
    requests: int = 20
    costs: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants that take turns at the same work.

    repeats: counted calls of each variant, after one that warms up. seconds: no new turn begins later, but LEAST turns
    are made.
    """

    variants: tuple[str, ...]
    work: Work
    repeats: int
    seconds: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load test, with the modes of MLPerf.

    rate: requests per second, as a share of the variant's rate one by one. bound: the required latency, as a multiple
    of the time of one call.
    """

    variant: str
    work: Work
    mode: str
    requests: int
    rate: float = 0.7
    bound: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cases and load tests of a model. costs: to measure on each backend of the runtime, None for nothing."""

    model: Model
    cases: tuple[Case, ...]
    loads: tuple[Load, ...]
    costs: CostWork | None

    @property
    def calls(self) -> int:
        """The largest number of calls of all variants, with warm-ups and without costs."""
        return sum(len(case.variants) * (1 + case.repeats) for case in self.cases) + sum(
            1 + calls_of(load) for load in self.loads
        )


def calls_of(load: Load) -> int:
    """The calls of a load test, without the first, which measures the time of a call."""
    return max(1, round(load.requests / load.work.batch))


def plan(model: Model, extent: Extent) -> Plan:
    """The plan of a model. Raises InvalidInput.

    Every variant is measured at the largest and smallest number of steps, at batch 1. Variants that are not torch peers
    are also measured at the other numbers of steps and the other batches. The first of them is also measured without
    guidance and under load.
    """
    _check(extent)
    peers, steps = extent.variants, extent.steps
    quick = tuple(name for name in peers if name not in TORCH_PEERS) or peers
    whole = schedule(max(steps))

    def case(variants: tuple[str, ...], work: Work, repeats: int = extent.repeats) -> Case:
        return Case(variants=variants, work=work, repeats=repeats, seconds=extent.seconds)

    cases = [case(peers, Work(whole, 1, True))]
    cases += [
        case(peers if few == min(steps) else quick, Work(schedule(few), 1, True))
        for few in sorted(set(steps) - {max(steps)}, reverse=True)
    ]
    cases += [
        case(quick, Work(whole, batch, True), max(LEAST, extent.repeats // 2))
        for batch in sorted(set(extent.batches) - {1})
    ]
    cases.append(case(quick[:1], Work(whole, 1, False)))
    modes = ("single-stream", "offline", "server") if extent.requests else ()
    loads = tuple(
        Load(
            variant=quick[0],
            work=Work(whole, max(extent.batches) if mode == "offline" else 1, True),
            mode=mode,
            requests=extent.requests,
        )
        for mode in modes
    )
    batches = extent.batches if extent.costs is None else extent.costs
    costs = CostWork(tuple(sorted(set(batches))), min(COST_REPEATS, extent.repeats)) if batches else None
    return Plan(model=model, cases=tuple(cases), loads=loads, costs=costs)


def schedule(steps: int) -> ScaleSchedule:
    return ScaleSchedule.parse(STEPS[steps])


def _check(extent: Extent) -> None:
    for name in extent.variants:
        if name not in VARIANTS:
            raise InvalidInput(
                f"variants has {name!r:.100}, which is unknown.",
                expected=f"some of {', '.join(VARIANTS)}",
                fix=f"Use some of: {', '.join(VARIANTS)}.",
            )
    for name in ("variants", "steps", "batches"):
        if not getattr(extent, name):
            raise InvalidInput(
                f"{name} is empty.", expected="at least one value", fix=f"Give {name} at least one value."
            )
    checks = [("steps", n, n in STEPS, f"{min(STEPS)} to {max(STEPS)}") for n in extent.steps]
    ranges = [*(("batches", n, 1, MAX_BATCH) for n in extent.batches)]
    ranges += [("costs", n, 1, MAX_BATCH) for n in extent.costs or ()]
    ranges += [("repeats", extent.repeats, 1, MAX_REPEATS), ("requests", extent.requests, 0, MAX_REQUESTS)]
    checks += [(name, n, low <= n <= high, f"{low} to {high}") for name, n, low, high in ranges]
    limits: list[tuple[str, float, bool, str]] = [*checks, ("seconds", extent.seconds, extent.seconds > 0, "above 0")]
    for name, value, right, expected in limits:
        if not right:
            raise InvalidInput(f"{name} has the value {value}.", expected=expected, fix=f"Use {expected}.")


def read_quality(path: Path, model: str) -> tuple[Quality, ...]:
    """The quality of each schedule in a file, as records of a model. Raises ArtifactRefused."""
    return tuple(
        Quality(model=model, schedule=str(one.schedule), accuracy=one.accuracy, frechet=one.frechet)
        for one in rated_schedules(path)
    )


def names_of(bundle: Bundle) -> str:
    """The usual name of a model of this size, such as "d16"."""
    model = bundle.manifest.model
    return f"d{model.depth}" if model.width == 64 * model.depth else f"{model.depth} blocks of {model.width}"
