"""What a run measures, as data: which model, which variants, which schedules and batches, how often."""

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
"""Schedules by number of steps: the paper's, and ours where it has none."""
LEAST = 3  # turns, whatever the time
COST_REPEATS = 10  # as many as the 90 % quantile of costs needs


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle and the checkpoint behind it, which the torch peers need."""

    name: str
    bundle: Path
    transformer: Path | None = None
    vae: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a model is measured.

    repeats: counted calls of every variant, fewer where they take more than `seconds`, but LEAST; requests: of each
    load test, 0 for none; costs: batch sizes whose times are kept for deadlines, None for those of `batches`.
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
    """Variants that take turns at the same work. Each gets `repeats` counted calls after one that warms up; no new turn
    begins after `seconds`, but LEAST are taken."""

    variants: tuple[str, ...]
    work: Work
    repeats: int
    seconds: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Load:
    """A load test, MLPerf's way. rate: requests a second as a share of what the variant does one by one; bound: the
    latency asked for, as a multiple of one image's."""

    variant: str
    work: Work
    mode: str
    requests: int
    rate: float = 0.7
    bound: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """costs: what is timed for deadlines, on every backend of the runtime; None for nothing."""

    model: Model
    cases: tuple[Case, ...]
    loads: tuple[Load, ...]
    costs: CostWork | None

    @property
    def calls(self) -> int:
        """Of all variants at the most, warm-ups included and costs not."""
        return sum(len(case.variants) * (1 + case.repeats) for case in self.cases) + sum(
            1 + calls_of(load) for load in self.loads
        )


def calls_of(load: Load) -> int:
    """After one that tells how long one takes."""
    return max(1, round(load.requests / load.work.batch))


def plan(model: Model, extent: Extent) -> Plan:
    """Every variant at the most steps asked for and batch 1; the runtime's own (those that are no torch peers) at every
    number of steps and at every batch; the first one without guidance too, and under load. Raises InvalidInput."""
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
            raise InvalidInput(f"variant {name!r:.100}", expected=f"some of {', '.join(VARIANTS)}", fix="name those")
    checks = [(f"no {name}", bool(getattr(extent, name)), "at least one") for name in ("variants", "steps", "batches")]
    checks += [(f"{n} steps", n in STEPS, f"{min(STEPS)} to {max(STEPS)}") for n in extent.steps]
    checks += [(f"a batch of {n}", n >= 1, "at least 1") for n in (*extent.batches, *(extent.costs or ()))]
    checks += [
        (f"{extent.repeats} repeats", extent.repeats >= 1, "at least 1"),
        (f"{extent.requests} requests", extent.requests >= 0, "0 or more"),
        (f"{extent.seconds} seconds", extent.seconds > 0, "more than 0"),
    ]
    for got, right, expected in checks:
        if not right:
            raise InvalidInput(got, expected=expected, fix="correct that option")


def read_quality(path: Path, model: str) -> tuple[Quality, ...]:
    """A table of quality by schedule as records of a model. Raises ArtifactRefused."""
    return tuple(
        Quality(model=model, schedule=str(one.schedule), accuracy=one.accuracy, frechet=one.frechet)
        for one in rated_schedules(path)
    )


def names_of(bundle: Bundle) -> str:
    """What people call a model of this size."""
    model = bundle.manifest.model
    return f"d{model.depth}" if model.width == 64 * model.depth else f"{model.depth} blocks of {model.width}"
