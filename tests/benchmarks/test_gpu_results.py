"""The table of docs/gpu.md says what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIDES = {
    "`cuda`": "cuda",
    "`ort-cuda`": "ort-cuda",
    "`torch.compile`, dynamic shapes": "torch.compile dynamic",
    "`torch.compile`, exact shapes": "torch.compile exact",
    "`torch-modules` (the export's modules in our runtime)": "torch-modules",
    "eager reference, as published": "flexvar_ref autocast-fp16",
    "eager reference, resident weights": "flexvar_ref resident-bf16",
    "`ort-cuda`, first run": "ort-cuda",
}
MARKS = ("¹", "²", "")  # of the cells whose figure is of the first, the second and the third run
PRECISIONS = {"fp16 autocast": ("autocast-fp16",), "bf16": ("resident-bf16",), "fp16": ("fp16", "float16")}
BATCHES = (1, 8, 64)


@pytest.fixture(scope="module")
def section() -> str:
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    return text.partition("## Measured times")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def runs(section: str) -> dict[str, dict[str, Any]]:
    """The results that the section names, each under the mark of its cells."""
    names = re.findall(r"\(\.\./benchmarks/results/(gpu_[^)]+\.json)\)", section)
    return {mark: json.loads((RESULTS / name).read_text()) for mark, name in zip(MARKS, names, strict=True)}


@pytest.fixture(scope="module")
def table(section: str) -> dict[str, list[str]]:
    """Label to cells: precision, mode, then one a batch."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    [head] = [cells for cells in lines if "batch 64" in cells]
    assert head[1:] == ["precision", "mode", *(f"batch {batch}" for batch in BATCHES)]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == len(head) and cells not in (head, ["---"] * 6)}


def rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def test_every_figure(table: dict[str, list[str]], runs: dict[str, dict[str, Any]]) -> None:
    rows = {
        (mark, row["side"], row["batch"]): row
        for mark, run in runs.items()
        for row in run["rows"]
        if row["model"] == "d16"
    }
    shown = set()
    for label, (precision, mode, *cells) in table.items():
        for batch, cell in zip(BATCHES, cells, strict=True):
            mark = next(mark for mark in MARKS if cell.endswith(mark))
            key = mark, SIDES.get(label, ""), batch
            if cell == "not measured":
                assert key not in rows or label.endswith("first run"), f"{label}, batch {batch}"
                continue
            row = rows[key]
            shown.add(key)
            expected = f"{rounded(row['wall_ms'])} ({rounded(row['images_per_second'])}){mark}"
            assert cell == expected, f"{label}, batch {batch}"
            assert row["precision"] in PRECISIONS[precision] and row["decoder_included"]
            modes = row["mode"] or "eager"
            assert mode == (modes if isinstance(modes, str) else ", ".join(modes))
            assert row["left_out"] is None, "what is wrong has no time"
    assert {key for key in rows if key[0] == ""} <= shown, "measured, and not in the table"


def test_card_and_date(section: str, runs: dict[str, dict[str, Any]]) -> None:
    for run in runs.values():
        assert f"on an {run['gpu']}, {run['created'][:10]}" in section
        assert {phase["stderr"] for phase in run["phases"].values()} == {None}
    assert "decoder included" in section
