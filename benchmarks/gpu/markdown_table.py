"""The table of times in docs/gpu.md, made from the rows of a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .rows_and_goals import CUDA, MAIN
from .stages import BATCHES

NOT_MEASURED = "not measured"
SIDES = {
    f"`{CUDA}`": (CUDA, "fp16", "cuda-graph"),
    "`ort-cuda`": ("ort-cuda", "fp16", "stream"),
    "`torch.compile`, dynamic shapes": ("torch.compile dynamic", "fp16", "cuda-graph"),
    "`torch.compile`, exact shapes": ("torch.compile exact", "fp16", "cuda-graph"),
    "`torch-modules` (the export's modules in our runtime)": ("torch-modules", "fp16", "cuda-graph"),
    "eager reference, as published": ("flexvar_ref autocast-fp16", "fp16 autocast", "eager"),
    "eager reference, resident weights": ("flexvar_ref resident-bf16", "bf16", "eager"),
}
"""Label of a row: the side of a result's rows, its precision, and how a generation usually runs there."""


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of a batch and images per second, for each side and batch. Rows that are left out do not count."""
    lines = [
        "| | precision | mode | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---" * (3 + len(BATCHES)) + "|",
    ]
    for label, (side, precision, usual) in SIDES.items():
        counted = [row for row in rows if row["side"] == side and row["model"] == MAIN and row["left_out"] is None]
        found = {row["batch"]: row for row in counted}
        modes = dict.fromkeys(_mode(row) for row in found.values())
        cells = [_cell(found.get(batch)) for batch in BATCHES]
        lines.append("| " + " | ".join([label, precision, ", ".join(modes) or usual, *cells]) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NOT_MEASURED
    return f"{_rounded(row['wall_ms'])} ({_rounded(row['images_per_second'])})"


def _mode(row: Mapping[str, Any]) -> str:
    mode = row["mode"] or "eager"
    return mode if isinstance(mode, str) else ", ".join(mode)


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"
