"""Draws charts as PNG: lines with their spread, and bars that show the parts of calls."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from flexvar_runtime.errors import BackendUnavailable

# Okabe and Ito's colours without yellow and black, then three of Paul Tol's. Colour-blind readers can tell them apart.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#117733", "#999933", "#666666",
)  # fmt: skip
MARKERS = "osD^vPX<>p"
DASHES = ("-", "--", ":", "-.")
INK, MUTED, GRID = "#22272e", "#5b6470", "#e3e6ea"
PART_COLOURS = {"condition": "#3d444d", "sampling": "#ffffff", "decode": "#b4bac2", "not separated": "#eceef1"}
WIDTH, DPI = 6.0, 200  # inches, and twice the pixels that a page shows
LETTER = 0.075  # inches
WIDE = 10.0  # an axis is logarithmic if its largest value is more than 10 times its smallest
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
}
PartKind = Literal["condition", "scale", "sampling", "decode", "not separated"]


@dataclass(frozen=True)
class Point:
    """A value with its spread from low to high, in the unit of the axis. text: written beside the point."""

    x: float
    y: float
    low: float
    high: float
    text: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a chart. look: index of its colour and marker. dash: index of its dashes, for lines of one look."""

    name: str
    look: int
    dash: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Part:
    """A part of a call. text: written into it if there is room."""

    kind: PartKind
    seconds: float
    text: str = ""


@dataclass(frozen=True)
class Bar:
    """A call: its parts in order, its duration and its least possible duration (None if unknown), in seconds."""

    name: str
    look: int
    parts: tuple[Part, ...]
    total: float
    limit: float | None


def from_extra(module: str) -> ModuleType:
    """Import a module of the bench extra. Raises BackendUnavailable where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"The module {module} is not installed.",
            expected="the bench extra",
            fix="Install it: pip install 'flexvar-deploy[bench]'",
        ) from error


def colour(look: int) -> str:
    return PALETTE[look % len(PALETTE)]


def three_digits(value: float) -> str:
    """A number with three significant digits, or with all digits before its point if these are more."""
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def line_chart(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, counted: bool = True, width: float = WIDTH
) -> bytes:
    """A chart of lines, as PNG.

    counted: x is a count, with a tick at every value, and y begins at zero. Otherwise both axes fit the points. width:
    inches. Raises BackendUnavailable without the bench extra.
    """
    with from_extra("matplotlib").rc_context(STYLE):
        names = [line.name for line in lines]
        columns = max(1, int(width / (0.6 + LETTER * max(map(len, names)))))  # of the legend, whose handles take 0.6
        figure, axes = _figure(3.4 + 0.18 * math.ceil(len(names) / columns), width)
        for line in lines:
            points = sorted(line.points, key=lambda point: point.x)
            xs, ys = [point.x for point in points], [point.y for point in points]
            errors = [[point.y - point.low for point in points], [point.high - point.y for point in points]]
            axes.errorbar(
                xs,
                ys,
                errors if any(map(any, errors)) else None,
                color=colour(line.look),
                marker=MARKERS[line.look % len(MARKERS)],
                linestyle=DASHES[line.dash % len(DASHES)],
                markersize=4.5,
                linewidth=1.5,
                elinewidth=1,
                capsize=2.5,
            )
            for point in points:
                axes.annotate(
                    point.text, (point.x, point.y), (5, -3), textcoords="offset points", va="top", fontsize=7.5
                )
        every = [point for line in lines for point in line.points]
        _scale(axes.xaxis, [point.x for point in every])
        _scale(axes.yaxis, [value for point in every for value in (point.low, point.high)])
        if counted:
            _ticks(axes.xaxis, sorted({point.x for point in every}))
            if axes.get_yscale() == "linear":
                axes.set_ylim(bottom=0)
        else:
            axes.margins(0.08, 0.12)  # room for the text beside the points
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(True)
        figure.legend(axes.containers, names, loc="outside lower left", ncols=columns)
        return _png(figure)


def part_chart(title: str, bars: Sequence[Bar]) -> bytes:
    """A chart with one bar for each call, in milliseconds, as PNG. Scales are shades of the colour of the bar.

    Raises BackendUnavailable without the bench extra.
    """
    with from_extra("matplotlib").rc_context(STYLE):
        figure, axes = _figure(1.5 + 0.45 * len(bars), 2 * WIDTH)
        longest = max(bar.total for bar in bars)
        for y, bar in enumerate(bars):
            _bar(axes, y, bar, longest / 10)  # about the seconds of one inch
        axes.set(title=title, xlabel="time of one call / ms", xlim=(0, 1.1e3 * longest), ylim=(len(bars) - 0.5, -0.6))
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars], color=INK)
        axes.grid(True, axis="x")
        axes.xaxis.set_major_formatter("{x:,g}")
        _part_legend(figure, bars)
        return _png(figure)


def _bar(axes: Any, y: int, bar: Bar, seconds_per_inch: float) -> None:
    left, place, scales = 0.0, 0, sum(part.kind == "scale" for part in bar.parts)
    for part in bar.parts:
        place += part.kind == "scale"
        shade = _shade(bar.look, place / scales) if part.kind == "scale" else PART_COLOURS[part.kind]
        hatch = "////" if part.kind == "sampling" else None
        inches = part.seconds / seconds_per_inch
        edge = 0.5 if inches > 0.04 else 0.0
        axes.barh(y, 1e3 * part.seconds, 0.62, 1e3 * left, color=shade, hatch=hatch, ec="white", lw=edge)
        if inches > LETTER * (len(part.text) + 1):
            middle = 1e3 * (left + part.seconds / 2)
            axes.text(middle, y, part.text, ha="center", va="center", fontsize=7.5, color=_on(shade))
        left += part.seconds
    end, text = 1e3 * max(left, bar.total), f"{three_digits(1e3 * bar.total)} ms"
    axes.annotate(text, (end, y), (5, 0), textcoords="offset points", va="center")
    if bar.limit is not None:
        axes.plot(1e3 * bar.limit, y - 0.4, "v", color=INK, ms=6)


def _part_legend(figure: Any, bars: Sequence[Bar]) -> None:
    patches, lines = from_extra("matplotlib.patches"), from_extra("matplotlib.lines")
    kinds = {part.kind for bar in bars for part in bar.parts}
    handles: dict[str, Any] = {
        kind: patches.Patch(fc=shade, ec=MUTED, lw=0.5, hatch="////" if kind == "sampling" else None)
        for kind, shade in {"condition": PART_COLOURS["condition"], "scale": "#8fb7d3", **PART_COLOURS}.items()
        if kind in kinds
    }
    names = {"scale": "scales, in the variant's colour, with their side in tokens"}
    if any(bar.limit is not None for bar in bars):
        handles["arithmetic limit of the call"] = lines.Line2D([], [], color=INK, marker="v", ls="", ms=6)
    figure.legend(handles.values(), [names.get(kind, kind) for kind in handles], loc="outside lower left", ncols=6)


def _figure(height: float, width: float) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot, which keeps every figure and needs a display."""
    figure: Any = from_extra("matplotlib.figure").Figure((width, height), DPI, layout="constrained")
    from_extra("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values are far apart."""
    ticker = from_extra("matplotlib.ticker")
    if min(values) > 0 and max(values) > WIDE * min(values):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:,g}")


def _ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_minor_locator(from_extra("matplotlib.ticker").NullLocator())


def _shade(look: int, strength: float) -> str:
    """The colour mixed with white. strength: 0 is a third of the colour, 1 all of it."""
    strength = 0.3 + 0.7 * strength
    return "#" + "".join(f"{round(255 - strength * (255 - value)):02x}" for value in _rgb(colour(look)))


def _on(background: str) -> str:
    """A text colour that can be read on `background`: dark or white."""
    red, green, blue = _rgb(background)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _rgb(code: str) -> Iterable[int]:
    return bytes.fromhex(code[1:])
