"""Writes results as one HTML page that works without a network, and its charts as files.

The page begins with the limits of the machine, and compares each time with them. Missing values read "not measured".
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from flexvar_runtime.files.atomic import atomic_write

from .charts import colour, from_extra, three_digits
from .records import Ceiling, Measured, Quality, Results, Scenario, Served
from .report_figures import FILES, NOT_MEASURED, Figure, Looks, curves, parts_of_calls, trades
from .report_numbers import count_steps, grouped, limit_of, median_of, normal, parts_gap, schedule_of, steps_of
from .timing import quantiles

TEMPLATE = "report.html.j2"
PAGE = "report.html"
BASELINE = "torch-eager"


@dataclass(frozen=True)
class Row:
    """A variant in a case. None means not measured.

    median: seconds. spread: half of p90 − p10, as a share of the median. share: the arithmetic limit as a share of the
    median. ratio: times as fast as the baseline. gap: see `parts_gap`.
    """

    measured: Measured
    median: float | None
    spread: float | None
    images_per_second: float | None
    share: float | None
    ratio: float | None
    gap: float | None

    @property
    def note(self) -> str:
        """Why there is no time."""
        note = self.measured.note
        return note if note.startswith(NOT_MEASURED) else f"{NOT_MEASURED}{note and ': '}{note}"


@dataclass(frozen=True)
class Case:
    """Variants that can be compared, the fastest first."""

    schedule: str
    steps: int
    batch: int
    guided: bool
    threads: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Rating:
    """The quality of a schedule, and its fastest guided call with its median in seconds. None means not measured."""

    quality: Quality
    steps: int
    fastest: Measured | None
    median: float | None


@dataclass(frozen=True)
class Load:
    """A load test. p50, p90, p99: seconds, None without requests. within: share of requests within the bound."""

    served: Served
    steps: int
    p50: float | None
    p90: float | None
    p99: float | None
    within: float | None


@dataclass(frozen=True)
class Model:
    """The part of the page about one model."""

    name: str
    cases: tuple[Case, ...]
    curves: tuple[Figure, ...]
    parts: Figure
    ratings: tuple[Rating, ...]
    trades: tuple[Figure, ...]
    loads: tuple[Load, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        return (*self.curves, self.parts, *self.trades)


def write_report(results: Results, out: Path) -> tuple[Path, ...]:
    """Write report.html and its charts into the folder `out`. Returns their paths, the page first.

    Files of these names are replaced. Charts that only the earlier report had are deleted. Raises BackendUnavailable
    without the bench extra.
    """
    jinja = from_extra("jinja2")
    models = _models(results)
    environment = jinja.Environment(autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True)
    environment.filters.update(scaled=_scaled, percent=_percent, times=_times, base64=_base64, colour=colour)
    text = files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    page = environment.from_string(text).render(
        environment=results.environment,
        ceiling=results.ceiling,
        models=models,
        looks=_looks(results),
        baseline=BASELINE,
        energy=any(measured.joules is not None for measured in results.measured),
    )
    charts = [(figure.file, figure.png) for model in models for figure in model.figures if figure.png is not None]
    out.mkdir(parents=True, exist_ok=True)
    stale = _stale(out, {name for name, _ in charts})
    for name, content in (*charts, (PAGE, page.encode())):
        with atomic_write(out / name, force=True) as temporary:
            temporary.write_bytes(content)
    for path in stale:
        path.unlink(missing_ok=True)
    return (out / PAGE, *(out / name for name, _ in charts))


def _stale(out: Path, names: Collection[str]) -> list[Path]:
    """Charts of the earlier report with other names than `names`: those whose bytes its page holds."""
    page = out / PAGE
    if not page.is_file():
        return []
    earlier = page.read_bytes()
    others = (path for kind in FILES for path in out.glob(f"{kind}-*.png") if path.name not in names)
    return [path for path in others if path.is_file() and base64.b64encode(path.read_bytes()) in earlier]


def _models(results: Results) -> tuple[Model, ...]:
    looks, file_names = _looks(results), set[str]()
    scenarios = _scenarios(results)
    models = []
    for name in dict.fromkeys((*(one.model for one in scenarios), *(one.model for one in results.quality))):
        measured = tuple(one for one in results.measured if one.scenario.model == name)
        timed = sorted((one for one in measured if one.seconds), key=_place)
        guided = [one for one in timed if one.scenario.guided]  # quality was measured with guidance
        quality = tuple(one for one in results.quality if one.model == name)
        served = (one for one in results.served if one.scenario.model == name)
        model = Model(
            name,
            cases=_cases(measured, results.ceiling),
            curves=curves(name, timed, looks),
            parts=parts_of_calls(name, timed, results.ceiling, looks),
            ratings=tuple(_rating(one, guided) for one in sorted(quality, key=lambda one: -steps_of(one.schedule))),
            trades=trades(name, guided, quality, looks),
            loads=tuple(map(_load, served)),
        )
        models.append(_with_file_names(model, file_names))
    return tuple(models)


def _with_file_names(model: Model, taken: set[str]) -> Model:
    """The model with file names for its charts: the model's name, with a number if two models would share it."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", model.name)[:100].strip("-.") or "model"
    suffix = next(one for i in range(1, 2 + len(taken)) if (one := plain if i == 1 else f"{plain}-{i}") not in taken)
    taken.add(suffix)

    def named(figure: Figure) -> Figure:
        return replace(figure, file=f"{figure.file}-{suffix}.png")

    return replace(
        model,
        curves=tuple(map(named, model.curves)),
        parts=named(model.parts),
        trades=tuple(map(named, model.trades)),
    )


# Numbers


def _place(measured: Measured) -> tuple[int, int]:
    """A sort key: small batches first, then long schedules."""
    return measured.scenario.batch, -count_steps(measured)


def _share(measured: Measured, ceiling: Ceiling) -> float | None:
    """The arithmetic limit as a share of the median. Above 1 if the limit was measured too low."""
    limit = limit_of(measured, ceiling)
    return None if limit is None else limit / median_of(measured)


def _cases(measured: Iterable[Measured], ceiling: Ceiling) -> tuple[Case, ...]:
    cases = []
    for together in grouped(measured, lambda one: _case_of(one.scenario)).values():
        baseline = next((one for one in together if one.seconds and one.scenario.variant == BASELINE), None)
        rows = [_row(one, baseline, ceiling) for one in together]
        rows.sort(key=lambda row: math.inf if row.median is None else row.median)
        schedule, batch, guided, threads = _case_of(together[0].scenario)
        cases.append(Case(schedule, steps_of(schedule), batch, guided, threads, tuple(rows)))
    return tuple(sorted(cases, key=lambda case: (-case.steps, case.schedule, case.batch)))


def _case_of(scenario: Scenario) -> tuple[str, int, bool, int]:
    return scenario.schedule, scenario.batch, scenario.guided, scenario.threads


def _row(measured: Measured, baseline: Measured | None, ceiling: Ceiling) -> Row:
    if not measured.seconds:
        return Row(measured, None, None, None, None, None, None)
    times = quantiles(measured.seconds)
    median = times["median"]
    return Row(
        measured,
        median=median,
        spread=(times["p90"] - times["p10"]) / 2 / median,
        images_per_second=measured.scenario.batch / median,
        share=_share(measured, ceiling),
        ratio=None if baseline is None else median_of(baseline) / median,
        gap=parts_gap(measured),
    )


def _rating(quality: Quality, timed: Iterable[Measured]) -> Rating:
    """The rating of a schedule, with its fastest call of the smallest batch."""
    same = [one for one in timed if schedule_of(one) == normal(quality.schedule)]
    fastest = min(same, key=lambda one: (one.scenario.batch, median_of(one)), default=None)
    return Rating(quality, steps_of(quality.schedule), fastest, None if fastest is None else median_of(fastest))


def _load(served: Served) -> Load:
    latencies, steps = np.asarray(served.latencies, np.float64), steps_of(served.scenario.schedule)
    if not latencies.size:
        return Load(served, steps, None, None, None, None)
    p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99)).tolist()
    within = None if served.bound is None else float((latencies <= served.bound).mean())
    return Load(served, steps, p50, p90, p99, within)


def _looks(results: Results) -> Looks:
    variants = dict.fromkeys(scenario.variant for scenario in _scenarios(results))
    return {variant: i for i, variant in enumerate(variants)}


def _scenarios(results: Results) -> list[Scenario]:
    return [*(one.scenario for one in results.measured), *(one.scenario for one in results.served)]


# How numbers are written


def _scaled(value: float | None, factor: float = 1.0) -> str | None:
    return None if value is None else three_digits(value * factor)


def _percent(share: float | None, before: str = "") -> str | None:
    return None if share is None else f"{before}{100 * share:.1f} %"


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}×"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
