"""Compares given scales in one pass (the graph `prefill`) with given scales one by one.

    python -m flexvar_bench.given_scales BUNDLE --json FILE

The first scales of the default schedule are given. --scales says how many. Both ways take turns, with guidance and
without. The first turn is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from flexvar_runtime import FlexVARPipeline, Guidance
from flexvar_runtime.files.atomic import atomic_write, require_parent
from flexvar_runtime.request import Request

from .variants import default_guidance

console = Console()


@dataclass(frozen=True, kw_only=True)
class Row:
    """Seconds of every turn, one image. ratio: the median of the turns' ratios, above 1 if one pass is faster."""

    scales: int
    guided: bool
    one_by_one: tuple[float, ...]
    one_pass: tuple[float, ...]

    @property
    def ratio(self) -> float:
        return float(np.median(np.divide(self.one_by_one, self.one_pass)))


def measure(pipe: FlexVARPipeline, scales: Sequence[int], turns: int) -> list[Row]:
    """Time both ways, in turns. The pipeline must have the graph `prefill`."""
    rows = []
    for guided in (True, False):
        guidance = default_guidance(pipe.bundle, guided)
        for count in scales:
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for turn in range(turns + 1):
                for prefills in (True, False) if turn % 2 else (False, True):
                    took = force(pipe, count, guidance, prefills)
                    if turn:
                        seconds[prefills].append(took)
            rows.append(
                Row(scales=count, guided=guided, one_by_one=tuple(seconds[False]), one_pass=tuple(seconds[True]))
            )
    return rows


def force(pipe: FlexVARPipeline, count: int, guidance: Guidance, prefills: bool) -> float:
    """Seconds that the first `count` scales take when their tokens are given."""
    rng = np.random.default_rng(count)
    sizes = pipe.schedule.scales[:count]
    tokens = [rng.integers(pipe.model.vocabulary, size=(1, *size)).astype(np.int32) for size in sizes]
    pipe.generator.prefills = prefills
    try:
        with pipe.generator.loop(Request.of([0], pipe.schedule, guidance)) as loop:
            start = time.perf_counter()
            loop.force(tokens)
            return time.perf_counter() - start
    finally:
        pipe.generator.prefills = True


def show(rows: Sequence[Row], title: str) -> None:
    table = Table("scales given", "", "one by one s", "one pass s", "times as fast", title=title, box=None)
    for row in rows:
        medians = (f"{np.median(seconds):.3f}" for seconds in (row.one_by_one, row.one_pass))
        table.add_row(str(row.scales), "guided" if row.guided else "not guided", *medians, f"{row.ratio:.2f}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="Bundle directory.")
    parser.add_argument("--scales", default="4,6,7,8", help="How many scales are given, comma-separated.")
    parser.add_argument("--turns", type=int, default=8, help="Counted turns.")
    parser.add_argument("--backend", default="ort-cpu", help="Backend to measure.")
    parser.add_argument("--threads", type=int, default=None, help="Processor threads.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    options = parser.parse_args(arguments)
    if options.json is not None:
        require_parent(options.json)
    with FlexVARPipeline.from_bundle(options.bundle, options.backend, threads=options.threads) as pipe:
        counts = [int(text) if text.isdecimal() else 0 for text in options.scales.split(",")]
        if options.turns < 1 or not all(2 <= count < len(pipe.schedule) for count in counts):
            most = len(pipe.schedule) - 1
            parser.error(
                f"--scales {options.scales} and --turns {options.turns} do not fit the bundle. "
                f"Give numbers of 2 to {most} scales, and at least 1 turn."
            )
        if not pipe.generator.prefills:
            parser.error(
                f"The bundle has no graph prefill for {pipe.backend.name}. Export it again, or build its engine."
            )
        rows = measure(pipe, counts, options.turns)
        found = {"bundle": pipe.bundle.sha256, "backend": pipe.backend.name, "threads": pipe.backend.threads}
    show(rows, f"given scales on {found['backend']}, {found['threads']} threads")
    if options.json is not None:
        document = found | {"rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
        with atomic_write(options.json, force=True) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
