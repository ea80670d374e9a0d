"""A file of results as one page that works without a network, and its charts beside it.

The limit stands first and everything is held against it. What is not there reads "not measured".
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import numpy as np

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.atomic import atomic_write
from flexvar_runtime.errors import ArtifactRefused

from .charts import WIDTH, Bar, Line, Part, Point, colour, from_extra, line_chart, part_chart, three_digits
from .records import Ceiling, Measured, Quality, Results, Scenario, Served
from .timing import quantiles

TEMPLATE = "report.html.j2"
PAGE = "report.html"
BASELINE = "torch-eager"
NOT_MEASURED = "not measured"
AXES = {
    "latency": "latency / ms",
    "throughput": "throughput / (images/s)",
    "steps": "number of steps",
    "batch": "batch / images",
}
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Looks = dict[str, int]  # the place of every variant in the palette


@dataclass(frozen=True)
class Row:
    """A variant in a case. median in seconds; spread: half of p10 … p90, of the median; share of the arithmetic limit;
    ratio: how many times faster than the baseline; gap: see `parts_gap`. None: not measured."""

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
        said = self.measured.note
        return said if said.startswith(NOT_MEASURED) else f"{NOT_MEASURED}{said and ': '}{said}"


@dataclass(frozen=True)
class Case:
    """Calls that can be compared, the fastest first."""

    schedule: str
    steps: int
    batch: int
    guided: bool
    threads: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Rating:
    """A schedule's quality and its fastest call, in seconds; None: not measured."""

    quality: Quality
    steps: int
    fastest: Measured | None
    median: float | None


@dataclass(frozen=True)
class Load:
    """Percentiles in seconds, None without requests; within: share of requests within the bound, None without one."""

    served: Served
    steps: int
    p50: float | None
    p90: float | None
    p99: float | None
    within: float | None


@dataclass(frozen=True)
class Figure:
    """png: None where too little was measured, and the caption is then what follows those words."""

    file: str
    title: str
    caption: str
    png: bytes | None


@dataclass(frozen=True)
class Model:
    """What the page says of one model."""

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
    """Write report.html and its charts into the folder `out`, replacing what has their names: the page's path first.

    Raises ArtifactRefused (a call faster than the limit), BackendUnavailable (without the bench extra).
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
    for name, content in (*charts, (PAGE, page.encode())):
        with atomic_write(out / name, force=True) as temporary:
            temporary.write_bytes(content)
    return (out / PAGE, *(out / name for name, _ in charts))


def parts_gap(measured: Measured) -> float | None:
    """How far the parts' sum is from the whole, as a share of the median; None unless every part is told."""
    scales, parts = measured.scales, (measured.condition, measured.sampling, measured.decode)
    known = [part for part in parts if part is not None]
    if not measured.seconds or scales is None or len(known) < len(parts):
        return None
    median = _median(measured)
    return abs(sum(known) + sum(scales) - median) / median


def _models(results: Results) -> tuple[Model, ...]:
    looks, file_names = _looks(results), set[str]()
    scenarios = _scenarios(results)
    models = []
    for name in dict.fromkeys((*(one.model for one in scenarios), *(one.model for one in results.quality))):
        measured = tuple(one for one in results.measured if one.scenario.model == name)
        timed = sorted((one for one in measured if one.seconds), key=_place)
        quality = tuple(one for one in results.quality if one.model == name)
        served = (one for one in results.served if one.scenario.model == name)
        model = Model(
            name,
            cases=_cases(measured, results.ceiling),
            curves=_curves(name, timed, looks),
            parts=_taken_apart(name, timed, results.ceiling, looks),
            ratings=tuple(_rating(one, timed) for one in sorted(quality, key=lambda one: -_steps(one.schedule))),
            trades=_trades(name, timed, quality, looks),
            loads=tuple(map(_load, served)),
        )
        models.append(_with_file_names(model, file_names))
    return tuple(models)


def _with_file_names(model: Model, taken: set[str]) -> Model:
    """Charts carry the model's name, as far as a file can, and a number where two models would share it."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", model.name).strip("-.") or "model"
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


def _median(measured: Measured) -> float:
    return quantiles(measured.seconds)["median"]


def _steps(schedule: str) -> int:
    return len(ScaleSchedule.parse(schedule))


def _count_steps(measured: Measured) -> int:
    return _steps(measured.scenario.schedule)


def _place(measured: Measured) -> tuple[int, int]:
    """Small batches first, then long schedules."""
    return measured.scenario.batch, -_count_steps(measured)


def _limit(measured: Measured, ceiling: Ceiling) -> float | None:
    """Seconds that the arithmetic of a call takes at the measured rate of its precision."""
    rate = ceiling.flops_per_second.get(measured.scenario.precision)
    return measured.flops / rate if measured.flops is not None and rate else None


def _share(measured: Measured, ceiling: Ceiling) -> float | None:
    """Of the arithmetic limit. Raises ArtifactRefused above 1."""
    limit = _limit(measured, ceiling)
    if limit is None:
        return None
    share, scenario = limit / _median(measured), measured.scenario
    if share > 1:
        raise ArtifactRefused(
            f"{scenario.variant} with {scenario.model} at {100 * share:.1f} % of the limit in {scenario.precision}",
            expected="at most 100 %: the limit was measured too low",
            fix="run the benchmark again on an idle machine",
        )
    return share


def _cases(measured: Iterable[Measured], ceiling: Ceiling) -> tuple[Case, ...]:
    cases = []
    for together in _grouped(measured, lambda one: _case_of(one.scenario)).values():
        baseline = next((one for one in together if one.seconds and one.scenario.variant == BASELINE), None)
        rows = [_row(one, baseline, ceiling) for one in together]
        rows.sort(key=lambda row: math.inf if row.median is None else row.median)
        schedule, batch, guided, threads = _case_of(together[0].scenario)
        cases.append(Case(schedule, _steps(schedule), batch, guided, threads, tuple(rows)))
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
        ratio=None if baseline is None else _median(baseline) / median,
        gap=parts_gap(measured),
    )


def _rating(quality: Quality, timed: Iterable[Measured]) -> Rating:
    """The fastest call of the smallest batch."""
    same = [one for one in timed if _schedule_of(one) == _normal(quality.schedule)]
    fastest = min(same, key=lambda one: (one.scenario.batch, _median(one)), default=None)
    return Rating(quality, _steps(quality.schedule), fastest, None if fastest is None else _median(fastest))


def _load(served: Served) -> Load:
    latencies, steps = np.asarray(served.latencies, np.float64), _steps(served.scenario.schedule)
    if not latencies.size:
        return Load(served, steps, None, None, None, None)
    p50, p90, p99 = np.quantile(latencies, (0.5, 0.9, 0.99)).tolist()
    within = None if served.bound is None else float((latencies <= served.bound).mean())
    return Load(served, steps, p50, p90, p99, within)


# What the charts show


def _curves(model: str, timed: Sequence[Measured], looks: Looks) -> tuple[Figure, ...]:
    """Latency and throughput against steps, at one batch and image size, and throughput against batch, at one
    schedule: those of which most was measured."""
    by_steps = _fullest(timed, lambda one: (one.scenario.batch, _last(one)), _count_steps)
    by_batch = _fullest(timed, _schedule_of, lambda one: one.scenario.batch)
    at_batch = f"Batch {by_steps[0].scenario.batch}, {_last(by_steps[0])} tokens" if by_steps else ""
    at_schedule = f"Schedule {_schedule_of(by_batch[0])}" if by_batch else ""

    def curve(y: str, x: str, at: str, points: Sequence[tuple[Measured, Point]], width: float = WIDTH) -> Figure:
        file, title = f"{y}-{x}", f"{model}: {y} against {x}"
        if len({point.x for _, point in points}) < 2:
            return Figure(file, title, "(one value only)" if points else "", None)
        png = line_chart(title, AXES[x], AXES[y], _lines(points, looks), width=width)
        return Figure(file, title, f"{at}; medians, bars from the 10th to the 90th percentile.", png)

    return (
        curve("latency", "steps", at_batch, [(one, _latency(one, _count_steps(one))) for one in by_steps], 2 * WIDTH),
        curve("throughput", "steps", at_batch, [(one, _throughput(one, _count_steps(one))) for one in by_steps]),
        curve("throughput", "batch", at_schedule, [(one, _throughput(one, one.scenario.batch)) for one in by_batch]),
    )


def _latency(measured: Measured, x: int) -> Point:
    times = quantiles(measured.seconds)
    return Point(x, 1e3 * times["median"], 1e3 * times["p10"], 1e3 * times["p90"])


def _throughput(measured: Measured, x: int) -> Point:
    batch, times = measured.scenario.batch, quantiles(measured.seconds)
    return Point(x, batch / times["median"], batch / times["p90"], batch / times["p10"])


def _taken_apart(model: str, timed: Sequence[Measured], ceiling: Ceiling, looks: Looks) -> Figure:
    """One bar a variant, at the batch and schedule at which most variants tell their parts."""
    title = f"{model}: parts of a call"

    def at(one: Measured) -> tuple[int, str]:
        return one.scenario.batch, _schedule_of(one)

    telling = _fullest([one for one in timed if one.scales is not None], at, lambda one: _settings(one.scenario))
    if not telling:
        return Figure("parts", title, "", None)
    batch, schedule = at(telling[0])
    chosen = [one for one in timed if at(one) == (batch, schedule)]
    names = _names({_settings(one.scenario) for one in chosen})
    bars = [
        Bar(
            names[_settings(one.scenario)],
            looks[one.scenario.variant],
            _parts(one),
            _median(one),
            _limit(one, ceiling),
        )
        for one in sorted(chosen, key=_median)
    ]
    unknown = "" if any(bar.limit is not None for bar in bars) else f" Limit: {NOT_MEASURED}."
    caption = f"Batch {batch}, schedule {schedule}; medians. Sampling is that of all scales.{unknown}"
    return Figure("parts", title, caption, part_chart(title, bars))


def _parts(measured: Measured) -> tuple[Part, ...]:
    """In the order of a call. What a variant does not tell is the rest."""
    parts = [Part("condition", measured.condition)] if measured.condition is not None else []
    if measured.scales is not None:
        texts = (_tokens(h, w) for h, w in ScaleSchedule.parse(measured.scenario.schedule))
        parts += [Part("scale", seconds, text) for seconds, text in zip(measured.scales, texts, strict=False)]
    ends = [Part("sampling", measured.sampling)] if measured.sampling is not None else []
    ends += [Part("decode", measured.decode, "decode")] if measured.decode is not None else []
    rest = _median(measured) - sum(part.seconds for part in (*parts, *ends))
    if parts_gap(measured) is None and rest > 0:
        parts.append(Part("not told apart", rest))
    return (*parts, *ends)


def _trades(model: str, timed: Sequence[Measured], quality: Sequence[Quality], looks: Looks) -> tuple[Figure, ...]:
    """Quality over the time of a call, at the batch at which most rated schedules were measured."""
    accuracy = {_normal(one.schedule): 100 * one.accuracy for one in quality if one.accuracy is not None}
    frechet = {_normal(one.schedule): one.frechet for one in quality if one.frechet is not None}

    def trade(file: str, title: str, y: str, rated: dict[str, float]) -> Figure:
        title = f"{model}: {title}"
        both = [one for one in timed if _schedule_of(one) in rated]
        chosen = _fullest(both, lambda one: one.scenario.batch, _schedule_of)
        if not chosen:
            return Figure(file, title, "", None)
        ends = {choose(map(_count_steps, chosen)) for choose in (min, max)}
        points = [(one, _rated(one, rated[_schedule_of(one)], ends)) for one in chosen]
        png = line_chart(title, AXES["latency"], y, _lines(points, looks), counted=False)
        return Figure(file, title, f"Batch {chosen[0].scenario.batch}; numbers at the ends: steps.", png)

    return (
        trade("accuracy-time", "recognised images against time", "recognised / %", accuracy),
        trade("frechet-time", "Fréchet distance against time", "Fréchet distance (less is better)", frechet),
    )


def _rated(measured: Measured, value: float, ends: Collection[int]) -> Point:
    steps = _count_steps(measured)
    return Point(1e3 * _median(measured), value, value, value, str(steps) if steps in ends else "")


def _lines(points: Iterable[tuple[Measured, Point]], looks: Looks) -> tuple[Line, ...]:
    """One line a variant, or more where it was measured in several settings."""
    lines, groups = [], _grouped(points, lambda pair: _settings(pair[0].scenario))
    names, dashes = _names(groups), dict[str, int]()
    for settings, group in groups.items():
        variant = settings[0]
        dashes[variant] = dash = dashes.get(variant, -1) + 1
        lines.append(Line(names[settings], looks[variant], dash, tuple(point for _, point in group)))
    return tuple(sorted(lines, key=lambda line: (line.look, line.dash)))


Settings = tuple[str, str, str, str]


def _settings(scenario: Scenario) -> Settings:
    guidance = "guided" if scenario.guided else "unguided"
    return scenario.variant, scenario.precision, guidance, f"{scenario.threads} threads"


def _names(every: Collection[Settings]) -> dict[Settings, str]:
    """A variant's name, and what tells its settings apart."""
    names = {}
    for settings in every:
        kin = [other for other in every if other[0] == settings[0]]
        names[settings] = ", ".join(
            text for text, *others in zip(settings, *kin, strict=True) if text == settings[0] or len(set(others)) > 1
        )
    return names


def _looks(results: Results) -> Looks:
    variants = dict.fromkeys(scenario.variant for scenario in _scenarios(results))
    return {variant: i for i, variant in enumerate(variants)}


def _scenarios(results: Results) -> list[Scenario]:
    return [*(one.scenario for one in results.measured), *(one.scenario for one in results.served)]


def _fullest(
    measured: Iterable[Measured], same: Callable[[Measured], Hashable], count: Callable[[Measured], Hashable]
) -> list[Measured]:
    """The group of one `same` with the most different `count`, the first of them on a tie."""
    groups = _grouped(measured, same).values()
    return max(groups, key=lambda group: len({count(one) for one in group}), default=[])


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _normal(schedule: str) -> str:
    return str(ScaleSchedule.parse(schedule))


def _schedule_of(measured: Measured) -> str:
    return _normal(measured.scenario.schedule)


def _last(measured: Measured) -> str:
    h, w = ScaleSchedule.parse(measured.scenario.schedule)[-1]
    return f"{h}×{w}"


def _tokens(h: int, w: int) -> str:
    return str(h) if h == w else f"{h}×{w}"


# How numbers are written


def _scaled(value: float | None, factor: float = 1.0) -> str | None:
    return None if value is None else three_digits(value * factor)


def _percent(share: float | None, before: str = "") -> str | None:
    return None if share is None else f"{before}{100 * share:.1f} %"


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}×"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
