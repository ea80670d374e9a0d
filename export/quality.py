"""A table of quality by schedule, as JSON: read, and put best first. Needs neither torch nor onnx."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.errors import ArtifactRefused, InvalidInput

_STEPS = re.compile(r"\d+ steps")  # rows of demo_quality that differ in their schedule alone


@dataclass(frozen=True, kw_only=True)
class Rated:
    """How good the pictures of a schedule are: recognised share (0 … 1) and Fréchet distance; None where unknown."""

    schedule: ScaleSchedule
    accuracy: float | None
    frechet: float | None


def read_quality(path: Path) -> tuple[Rated, ...]:
    """What `flexvar_bench.demo_quality` writes, or {schedule: {"frechet": number}}, in the order of the file.

    Raises ArtifactRefused, for schedules of different numbers of `images` too: their distances cannot be compared.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in document:
            rows = {row["schedule"]: row for row in document["rows"] if _STEPS.fullmatch(row["name"])}
        else:
            rows = document
        if len(counts := {row.get("images") for row in rows.values()}) > 1:
            raise ValueError(f"schedules of different numbers of images: {counts}")
        rated = tuple(
            Rated(
                schedule=ScaleSchedule.parse(text),
                accuracy=_number(row.get("accuracy")),
                frechet=_number(row.get("frechet")),
            )
            for text, row in rows.items()
        )
        if len({one.schedule for one in rated}) < len(rated):
            raise ValueError("a schedule twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactRefused(
            f"{path.name} ({error!r:.100})",
            expected='a JSON table such as {"1_2_4_8_16": {"frechet": 12.3}}',
            fix="see docs/benchmarks.md",
        ) from error
    return rated


def best_first(rated: Iterable[Rated], default: ScaleSchedule) -> tuple[str, ...]:
    """Schedules to the size of `default`, the smallest Fréchet distance first; of equal ones that with fewer tokens.

    Raises InvalidInput where no such schedule has a distance.
    """
    order = sorted(
        (one.frechet, one.schedule.tokens, str(one.schedule))
        for one in rated
        if one.frechet is not None and one.schedule[-1] == default[-1]
    )
    if not order:
        h, w = default[-1]
        raise InvalidInput(
            f"no Fréchet distance of a schedule that ends at {h}x{w}",
            expected=f"some, since the bundle's default is {default}",
            fix="measure the quality of such schedules",
        )
    return tuple(text for _, _, text in order)


def _number(value: Any) -> float | None:
    """Raises ValueError for what is neither None nor a finite number of at least 0."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r:.50} in place of a number")
    return float(value)
