"""Measures how often deadlines are met, right after the costs of the schedules were measured.

    python -m flexvar_bench.deadlines BUNDLE --requests 200 --json FILE

Each request has its own class, seed and deadline. Deadlines are drawn log-uniformly, from 1.02 times the cost of the
fastest schedule in the bundle's quality order to 1.5 times the cost of the slowest. The time of the whole call counts,
with the choice of the schedule and the decoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flexvar_runtime import CostRow, FlexVARPipeline, ScaleSchedule
from flexvar_runtime.deadlines.choice import quality_order
from flexvar_runtime.files.atomic import atomic_write, require_parent

TIGHTEST, WIDEST = 1.02, 1.5  # times the cost of the fastest schedule, and of the slowest
console = Console()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A served request: its deadline, the chosen schedule with its cost (expected), and the time taken, in seconds."""

    deadline: float
    schedule: str
    expected: float
    seconds: float

    @property
    def late(self) -> float:
        """The overrun as a share of the deadline. It is at most 0 if the deadline was met."""
        return self.seconds / self.deadline - 1


@dataclass(frozen=True, kw_only=True)
class Share:
    """Shares of some requests that met their deadline, and that took at most the cost, as 9 of 10 should.

    missed_by: median and largest overrun of the others, as shares of the deadline. None if all met it.
    """

    requests: int
    met: float
    kept_to_cost: float
    missed_by: tuple[float, float] | None


def deadlines(costs: Sequence[float], requests: int, seed: int) -> list[float]:
    """Seconds, log-uniform between TIGHTEST times the least cost and WIDEST times the largest."""
    low, high = np.log(TIGHTEST * min(costs)), np.log(WIDEST * max(costs))
    drawn: list[float] = np.exp(np.random.default_rng(seed).uniform(low, high, requests)).tolist()
    return drawn


def ask(
    pipe: FlexVARPipeline,
    wanted: Sequence[float],
    batch: int,
    seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Answer]:
    """Make one request after the other. The costs must have been measured."""
    rng, answers = np.random.default_rng([seed, 1]), []
    for i, deadline in enumerate(wanted):
        labels = rng.integers(pipe.model.classes, size=batch).tolist()
        start = clock()
        choice = pipe(labels, seed=seed + i, deadline_ms=1e3 * deadline).choice
        seconds = clock() - start
        assert choice is not None  # a call with a deadline returns its choice
        answers.append(
            Answer(deadline=deadline, schedule=str(choice.schedule), expected=choice.expected, seconds=seconds)
        )
    return answers


def share(answers: Sequence[Answer]) -> Share:
    late = [one.late for one in answers if one.late > 0]
    return Share(
        requests=len(answers),
        met=1 - len(late) / len(answers),
        kept_to_cost=sum(one.seconds <= one.expected for one in answers) / len(answers),
        missed_by=(float(np.median(late)), max(late)) if late else None,
    )


def by_schedule(answers: Sequence[Answer], order: Sequence[ScaleSchedule]) -> dict[str, Share]:
    """The shares for each schedule that was chosen, best first."""
    groups = {str(schedule): [one for one in answers if one.schedule == str(schedule)] for schedule in order}
    return {schedule: share(group) for schedule, group in groups.items() if group}


def measure(
    pipe: FlexVARPipeline, *, requests: int, batch: int, repeats: int, seed: int
) -> tuple[list[CostRow], list[Answer]]:
    """Measure the costs, then make the requests."""
    rows: list[CostRow] = []
    pipe.measure_costs((batch,), repeats=repeats, on_row=rows.append)
    return rows, ask(pipe, deadlines([row.p90 for row in rows], requests, seed), batch, seed)


def result(pipe: FlexVARPipeline, rows: Sequence[CostRow], answers: Sequence[Answer]) -> dict[str, Any]:
    """The whole result as JSON values."""
    order = quality_order(pipe.bundle.manifest)
    return {
        "bundle": pipe.bundle.sha256,
        "backend": pipe.backend.name,
        "threads": pipe.backend.threads,
        "batch": rows[0].batch,
        "costs": [{"schedule": row.schedule, "p90": row.p90, "median": row.median} for row in rows],
        "all": asdict(share(answers)),
        "by_schedule": {name: asdict(one) for name, one in by_schedule(answers, order).items()},
        "answers": [asdict(one) for one in answers],
    }


def show(found: dict[str, Any]) -> None:
    costs = {row["schedule"]: f"{1e3 * row['p90']:.1f}" for row in found["costs"]}
    title = f"deadlines on {found['backend']}, {found['threads']} threads, batch {found['batch']}"
    table = Table("schedule", "cost ms", "asked", "met", "kept to cost", "late by", "at most", title=title, box=None)
    for name, one in {**found["by_schedule"], "all": found["all"]}.items():
        missed = ["", ""] if one["missed_by"] is None else [f"{value:.1%}" for value in one["missed_by"]]
        shares = [f"{one[key]:.1%}" for key in ("met", "kept_to_cost")]
        table.add_row(name, costs.get(name, ""), str(one["requests"]), *shares, *missed)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle directory.")
    parser.add_argument("--requests", type=int, default=200, help="Number of requests.")
    parser.add_argument("--batch", type=int, default=1, help="Images of each request.")
    parser.add_argument("--repeats", type=int, default=10, help="Timed generations for each cost.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the deadlines, classes and images.")
    parser.add_argument("--backend", default="ort-cpu", help="Backend to measure.")
    parser.add_argument("--threads", type=int, default=None, help="Processor threads.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    options = parser.parse_args(arguments)
    if options.requests < 1:
        parser.error(f"--requests is {options.requests}, but it must be at least 1.")
    if options.json is not None:
        require_parent(options.json)
    with FlexVARPipeline.from_bundle(options.bundle, options.backend, threads=options.threads) as pipe:
        rows, answers = measure(
            pipe, requests=options.requests, batch=options.batch, repeats=options.repeats, seed=options.seed
        )
        found = result(pipe, rows, answers)
    show(found)
    if options.json is not None:
        with atomic_write(options.json, force=True) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
