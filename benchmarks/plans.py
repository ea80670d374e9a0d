"""What a run measures, as data: which model, which variants, which schedules and batches, how often."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.schedule import PUBLISHED

from .records import Quality
from .variants import TORCH_PEERS, VARIANTS, Work

STEPS = {4: "1_3_8_16", 5: "1_2_5_10_16", 7: "1_2_3_5_8_13_16", **{n: PUBLISHED[str(n)] for n in (6, 8, 9, 10)}}
"""Schedules by number of steps: the paper's, and ours where it has none."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle and the checkpoint behind it, which the torch peers need."""

    name: str
    bundle: Path
    transformer: Path | None = None
    vae: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants that take turns at the same work. Each gets `repeats` counted calls after one that warms up."""

    variants: tuple[str, ...]
    work: Work
    repeats: int


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
    model: Model
    cases: tuple[Case, ...]
    loads: tuple[Load, ...]


def plan(
    model: Model,
    variants: Sequence[str],
    *,
    steps: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    requests: int,
) -> Plan:
    """Every variant at the most steps asked for and batch 1; the runtime's own (those that are no torch peers) at every
    number of steps and at every batch; the first one without guidance too, and under load.

    requests: of each load test; 0 for none. Raises InvalidInput.
    """
    _check(variants, steps, batches, repeats)
    peers = tuple(variants)
    quick = tuple(name for name in variants if name not in TORCH_PEERS) or peers
    whole = schedule(max(steps))
    cases = [Case(variants=peers, work=Work(whole, 1, True), repeats=repeats)]
    cases += [
        Case(variants=peers if few == min(steps) else quick, work=Work(schedule(few), 1, True), repeats=repeats)
        for few in sorted(set(steps) - {max(steps)}, reverse=True)
    ]
    cases += [
        Case(variants=quick, work=Work(whole, batch, True), repeats=max(3, repeats // 2))
        for batch in sorted(set(batches) - {1})
    ]
    cases.append(Case(variants=quick[:1], work=Work(whole, 1, False), repeats=repeats))
    loads = tuple(
        Load(
            variant=quick[0],
            work=Work(whole, max(batches) if mode == "offline" else 1, True),
            mode=mode,
            requests=count,
        )
        for mode, count in (("single-stream", requests), ("offline", requests), ("server", requests))
        if count
    )
    return Plan(model=model, cases=tuple(cases), loads=loads)


def schedule(steps: int) -> ScaleSchedule:
    return ScaleSchedule.parse(STEPS[steps])


def _check(variants: Sequence[str], steps: Sequence[int], batches: Sequence[int], repeats: int) -> None:
    for name in variants:
        if name not in VARIANTS:
            raise InvalidInput(f"variant {name!r:.100}", expected=f"some of {', '.join(VARIANTS)}", fix="name those")
    wrong = [number for number in steps if number not in STEPS]
    if wrong or not variants or not steps or not batches or min(batches, default=1) < 1 or repeats < 1:
        raise InvalidInput(
            f"steps {list(steps)}, batches {list(batches)}, {repeats} repeats of {list(variants)}",
            expected=f"variants, steps from {min(STEPS)} to {max(STEPS)}, batches and repeats of at least 1",
            fix="correct the options",
        )


def read_quality(path: Path, model: str) -> tuple[Quality, ...]:
    """A table of quality by schedule: what `flexvar_bench.demo_quality` writes, or {schedule: {"frechet": number}}.

    Raises ArtifactRefused.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in document:
            rows = {
                row["schedule"]: row for row in document["rows"] if row["name"] in {f"{steps} steps" for steps in STEPS}
            }
        else:
            rows = document
        return tuple(
            Quality(
                model=model,
                schedule=str(ScaleSchedule.parse(text)),
                accuracy=row.get("accuracy"),
                frechet=row.get("frechet"),
            )
            for text, row in rows.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactRefused(
            f"{path.name} ({error!r:.100})",
            expected='a JSON table such as {"1_2_4_8_16": {"frechet": 12.3}}',
            fix="see docs/benchmarks.md",
        ) from error


def names_of(bundle: Bundle) -> str:
    """What people call a model of this size."""
    model = bundle.manifest.model
    return f"d{model.depth}" if model.width == 64 * model.depth else f"{model.depth} blocks of {model.width}"
