"""Read a table of quality by schedule, and sort it. This module needs neither torch nor onnx.

Three forms of JSON are read: a plain table, `sweep.json` of `flexvar evaluate sweep`, and `quality.json` of the demo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.checks import short
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import loads

_KEYS = {"accuracy", "frechet", "images"}  # of a row of a plain table
_STEPS = re.compile(r"\d+ steps")  # the rows of the demo's quality.json that differ only in their schedule


@dataclass(frozen=True, kw_only=True)
class Rated:
    """The quality of the images of a schedule: recognised share (0 … 1) and Fréchet distance. None where unknown."""

    schedule: ScaleSchedule
    accuracy: float | None
    frechet: float | None


def read_quality(path: Path) -> tuple[Rated, ...]:
    """Read a table of the form {schedule: {"frechet": number}}, `sweep.json` or `quality.json`, in its order.

    Of `sweep.json`, only the points of the first bundle with the first guidance are taken. Raises ArtifactRefused, also
    where schedules were measured on different numbers of images, because their distances cannot be compared.
    """
    fix = 'Write a JSON table such as {"1_2_4_8_16": {"frechet": 12.3}}.'
    document = loads(read_small(path, fix=fix), where=path.name, fix=fix)
    problem = f"{path.name} is not a table of quality by schedule"
    with refuse_failures(problem, expected='a JSON table such as {"1_2_4_8_16": {"frechet": 12.3}}', fix=fix):
        return _table(document)


def _table(document: Any) -> tuple[Rated, ...]:
    """The table in a document. Raises exceptions of any type if it is not one."""
    if "rows" in document:
        rows = [(row["schedule"], row) for row in document["rows"] if _STEPS.fullmatch(row["name"])]
    elif "points" in document:
        rows = [_row_of(point) for point in _first_curve(document["points"])]
    else:
        rows = list(document.items())
        for text, row in rows:
            if unknown := sorted(row.keys() - _KEYS):
                raise ValueError(f"{short(text)} has the unknown key {short(unknown[0])}")
    if len(counts := {row.get("images") for _, row in rows}) > 1:
        raise ValueError(f"schedules of different numbers of images: {short(list(counts))}")
    rated = tuple(
        Rated(schedule=_schedule(text), accuracy=_number(row.get("accuracy")), frechet=_number(row.get("frechet")))
        for text, row in rows
    )
    if len({one.schedule for one in rated}) < len(rated):
        raise ValueError("a schedule occurs twice")
    return rated


def _first_curve(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a sweep that differ from its first one in their schedule alone."""
    return [point for point in points if all(point[key] == points[0][key] for key in ("bundle", "guidance"))]


def _row_of(point: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The schedule of a point of a sweep, and its figures as a row."""
    return point["schedule"], {"accuracy": point["recognised"], "frechet": point["fid"], "images": point["images"]}


def _schedule(text: str) -> ScaleSchedule:
    try:
        return ScaleSchedule.parse(text)
    except InvalidInput as error:
        raise ValueError(error.got) from error


def best_first(rated: Iterable[Rated], default: ScaleSchedule) -> tuple[str, ...]:
    """The schedules that end at the size of `default`, the smallest Fréchet distance first.

    Among equal distances the schedule with fewer tokens comes first. Raises InvalidInput where no such schedule has a
    distance.
    """
    order = sorted(
        (one.frechet, one.schedule.tokens, str(one.schedule))
        for one in rated
        if one.frechet is not None and one.schedule[-1] == default[-1]
    )
    if not order:
        h, w = default[-1]
        raise InvalidInput(
            f"The table of quality has no Fréchet distance of a schedule that ends at {h}x{w}, as the default does.",
            expected=f"a schedule that ends at {h}x{w}",
            fix="Measure the quality of such schedules, or leave --quality out.",
        )
    return tuple(text for _, _, text in order)


def _number(value: Any) -> float | None:
    """The value as a float, or None. Raises ValueError unless it is None or a finite number of at least 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r:.50} is not a number of at least 0")
    return float(value)
