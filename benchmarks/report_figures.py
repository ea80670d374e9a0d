"""The charts of a report: the measurements that each one shows, and its caption."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass

from flexvar_runtime import ScaleSchedule

from .charts import WIDTH, Bar, Line, Part, Point, line_chart, part_chart
from .records import Ceiling, Measured, Quality, Scenario
from .report_numbers import count_steps, grouped, limit_of, median_of, normal, parts_gap, schedule_of
from .timing import quantiles

NOT_MEASURED = "not measured"
AXES = {
    "latency": "latency / ms",
    "throughput": "throughput / (images/s)",
    "steps": "number of steps",
    "batch": "batch / images",
}
FILES = ("latency-steps", "throughput-steps", "throughput-batch", "parts", "accuracy-time", "frechet-time")
Looks = dict[str, int]  # the place of every variant in the palette


@dataclass(frozen=True)
class Figure:
    """A chart. png: None if too little was measured. The caption then follows the words "not measured"."""

    file: str
    title: str
    caption: str
    png: bytes | None


def curves(model: str, timed: Sequence[Measured], looks: Looks) -> tuple[Figure, ...]:
    """Latency and throughput against steps at one batch and image size, and throughput against batch at one schedule.

    Batch, size and schedule are those with the most measurements.
    """
    by_steps = _fullest(timed, lambda one: (one.scenario.batch, _last(one)), count_steps)
    by_batch = _fullest(timed, schedule_of, lambda one: one.scenario.batch)
    at_batch = f"Batch {by_steps[0].scenario.batch}, {_last(by_steps[0])} tokens" if by_steps else ""
    at_schedule = f"Schedule {schedule_of(by_batch[0])}" if by_batch else ""

    def curve(y: str, x: str, at: str, points: Sequence[tuple[Measured, Point]], width: float = WIDTH) -> Figure:
        file, title = f"{y}-{x}", f"{model}: {y} against {x}"
        if len({point.x for _, point in points}) < 2:
            return Figure(file, title, "(one value only)" if points else "", None)
        png = line_chart(title, AXES[x], AXES[y], _lines(points, looks), width=width)
        return Figure(file, title, f"{at}; medians, bars from the 10th to the 90th percentile.", png)

    return (
        curve("latency", "steps", at_batch, [(one, _latency(one, count_steps(one))) for one in by_steps], 2 * WIDTH),
        curve("throughput", "steps", at_batch, [(one, _throughput(one, count_steps(one))) for one in by_steps]),
        curve("throughput", "batch", at_schedule, [(one, _throughput(one, one.scenario.batch)) for one in by_batch]),
    )


def _latency(measured: Measured, x: int) -> Point:
    times = quantiles(measured.seconds)
    return Point(x, 1e3 * times["median"], 1e3 * times["p10"], 1e3 * times["p90"])


def _throughput(measured: Measured, x: int) -> Point:
    batch, times = measured.scenario.batch, quantiles(measured.seconds)
    return Point(x, batch / times["median"], batch / times["p90"], batch / times["p10"])


def parts_of_calls(model: str, timed: Sequence[Measured], ceiling: Ceiling, looks: Looks) -> Figure:
    """A chart with one bar for each variant, at the batch and schedule at which most variants report their parts."""
    title = f"{model}: parts of a call"

    def at(one: Measured) -> tuple[int, str]:
        return one.scenario.batch, schedule_of(one)

    reporting = _fullest([one for one in timed if one.scales is not None], at, lambda one: _settings(one.scenario))
    if not reporting:
        return Figure("parts", title, "", None)
    batch, schedule = at(reporting[0])
    chosen = [one for one in timed if at(one) == (batch, schedule)]
    names = _names({_settings(one.scenario) for one in chosen})
    bars = [
        Bar(
            names[_settings(one.scenario)],
            looks[one.scenario.variant],
            _parts(one),
            median_of(one),
            limit_of(one, ceiling),
        )
        for one in sorted(chosen, key=median_of)
    ]
    unknown = "" if any(bar.limit is not None for bar in bars) else f" Limit: {NOT_MEASURED}."
    caption = f"Batch {batch}, schedule {schedule}; medians. Sampling is that of all scales.{unknown}"
    return Figure("parts", title, caption, part_chart(title, bars))


def _parts(measured: Measured) -> tuple[Part, ...]:
    """The parts of a call in order. The rest is what the variant does not report."""
    parts = [Part("condition", measured.condition)] if measured.condition is not None else []
    if measured.scales is not None:
        texts = (_tokens(h, w) for h, w in ScaleSchedule.parse(measured.scenario.schedule))
        parts += [Part("scale", seconds, text) for seconds, text in zip(measured.scales, texts, strict=False)]
    ends = [Part("sampling", measured.sampling)] if measured.sampling is not None else []
    ends += [Part("decode", measured.decode, "decode")] if measured.decode is not None else []
    rest = median_of(measured) - sum(part.seconds for part in (*parts, *ends))
    if parts_gap(measured) is None and rest > 0:
        parts.append(Part("not separated", rest))
    return (*parts, *ends)


def trades(model: str, timed: Sequence[Measured], quality: Sequence[Quality], looks: Looks) -> tuple[Figure, ...]:
    """Charts of quality against the time of a call, at the batch at which most rated schedules were measured."""
    accuracy = {normal(one.schedule): 100 * one.accuracy for one in quality if one.accuracy is not None}
    frechet = {normal(one.schedule): one.frechet for one in quality if one.frechet is not None}

    def trade(file: str, title: str, y: str, rated: dict[str, float]) -> Figure:
        title = f"{model}: {title}"
        both = [one for one in timed if schedule_of(one) in rated]
        chosen = _fullest(both, lambda one: one.scenario.batch, schedule_of)
        if not chosen:
            return Figure(file, title, "", None)
        ends = {choose(map(count_steps, chosen)) for choose in (min, max)}
        points = [(one, _rated(one, rated[schedule_of(one)], ends)) for one in chosen]
        png = line_chart(title, AXES["latency"], y, _lines(points, looks), counted=False)
        return Figure(file, title, f"Batch {chosen[0].scenario.batch}; numbers at the ends: steps.", png)

    return (
        trade("accuracy-time", "recognised images against time", "recognised / %", accuracy),
        trade("frechet-time", "Fréchet distance against time", "Fréchet distance (less is better)", frechet),
    )


def _rated(measured: Measured, value: float, ends: Collection[int]) -> Point:
    steps = count_steps(measured)
    return Point(1e3 * median_of(measured), value, value, value, str(steps) if steps in ends else "")


def _lines(points: Iterable[tuple[Measured, Point]], looks: Looks) -> tuple[Line, ...]:
    """One line for each variant, or several if it was measured in several settings."""
    lines, groups = [], grouped(points, lambda pair: _settings(pair[0].scenario))
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
    """A name for each of the settings: the variant, and the settings in which its lines differ."""
    names = {}
    for settings in every:
        related = [other for other in every if other[0] == settings[0]]
        names[settings] = ", ".join(
            text
            for text, *others in zip(settings, *related, strict=True)
            if text == settings[0] or len(set(others)) > 1
        )
    return names


def _fullest(
    measured: Iterable[Measured], same: Callable[[Measured], Hashable], count: Callable[[Measured], Hashable]
) -> list[Measured]:
    """Of the groups with equal `same`, the one with the most different values of `count`. The first one on a tie."""
    groups = grouped(measured, same).values()
    return max(groups, key=lambda group: len({count(one) for one in group}), default=[])


def _last(measured: Measured) -> str:
    h, w = ScaleSchedule.parse(measured.scenario.schedule)[-1]
    return f"{h}×{w}"


def _tokens(h: int, w: int) -> str:
    return str(h) if h == w else f"{h}×{w}"
