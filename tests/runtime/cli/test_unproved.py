"""The commands on a bundle whose parity record is not that of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Change = Callable[[dict[str, Any]], object]
PROBLEM = "step.onnx is not the file that was compared with the reference"


def edit(bundle: Path, change: Change) -> None:
    path = bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def unproved(bundle_copy: Path) -> Path:
    """A whole bundle whose record is of another step graph."""
    edit(bundle_copy, lambda document: document["parity"]["files"].update({"step.onnx": "e" * 64}))
    return bundle_copy


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path))


def squeezed(text: str) -> str:
    """The text without the borders of tables and without line breaks."""
    return " ".join(text.replace("│", "").split())


def test_commands_that_refuse_it(flexvar: Any, unproved: Path, picture: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.png"
    for command in (
        ("generate", unproved, "--classes", 1, "-o", made),
        ("edit", unproved, "--image", picture, "--task", "refine", "-o", made),
        ("bench", "run", unproved, "-o", made),
        ("bench", "run", unproved, "--name", "tiny", "-o", made),
    ):
        ended = flexvar(*command)
        assert ended.refused(5, PROBLEM, "--allow-unproved"), command
        assert not made.exists()


def test_generate_if_it_is_allowed(flexvar: Any, unproved: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """The image is that of the same files in a proved bundle."""
    how = ("--classes", 1, "--schedule", "1_2", "--seed", 1)
    ended = flexvar("generate", unproved, *how, "-o", tmp_path / "a", "--allow-unproved", "--json")
    assert ended.code == 0 and ended.json["images"]  # the warning is not in standard output
    assert PROBLEM in squeezed(ended.err) and ended.err.count("WARNING") == 1
    assert "WARNING" not in flexvar("generate", tiny_bundle, *how, "-o", tmp_path / "b", "--allow-unproved").err
    name = "000000_class0001.png"
    assert np.array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))


def test_edit_if_it_is_allowed(flexvar: Any, unproved: Path, picture: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.png"
    how = ("--image", picture, "--task", "refine", "--schedule", "1_16", "-o", made, "--allow-unproved")
    ended = flexvar("edit", unproved, *how)
    assert ended.code == 0 and made.exists() and PROBLEM in squeezed(ended.err)


def test_inspect_shows_it(flexvar: Any, unproved: Path, tiny_bundle: Path) -> None:
    ended = flexvar("inspect", unproved, "--json")
    assert ended.code == 0 and ended.json["proved"] is False and PROBLEM in ended.json["unproved_because"]
    assert f"proved {PROBLEM}" in squeezed(flexvar("inspect", unproved).out)
    assert "proved yes" in squeezed(flexvar("inspect", tiny_bundle).out)


@pytest.mark.parametrize("rows", ["the first", "of a PSNR", "all", "none"])
@pytest.mark.parametrize("bound", [0, 5e-324])
def test_inspect_with_bounds_that_cannot_be_divided_by(
    flexvar: Any, bundle_copy: Path, rows: str, bound: float
) -> None:
    def change(document: dict[str, Any]) -> None:
        parity = document["parity"]
        if rows == "none":
            parity["rows"] = []
        first, psnr = parity["rows"][:1], [row for row in parity["rows"] if row["metric"] == "psnr_db"]
        for row in {"the first": first, "of a PSNR": psnr, "all": parity["rows"], "none": []}[rows]:
            row["bound"] = bound

    edit(bundle_copy, change)
    ended = flexvar("inspect", bundle_copy)
    assert ended.code == 0 and "parity" in ended.out
    assert flexvar("inspect", bundle_copy, "--json").json["proved"] is (rows == "of a PSNR")


@pytest.mark.parametrize("schedule", ["1_0", "2_4", "1" + "_2" * 64, "512px"])
def test_default_schedules_that_do_not_exist(flexvar: Any, bundle_copy: Path, tmp_path: Path, schedule: str) -> None:
    edit(bundle_copy, lambda document: document["defaults"].update(schedule=schedule))
    for command in (("inspect", bundle_copy), ("generate", bundle_copy, "--classes", 0, "-o", tmp_path / "made")):
        assert flexvar(*command).refused(5, "manifest.json: defaults.schedule")


def test_a_default_schedule_that_does_not_fit_in_memory(flexvar: Any, bundle_copy: Path, tmp_path: Path) -> None:
    """It needs more than any machine has, which is noticed before anything is computed."""
    edit(bundle_copy, lambda document: document["defaults"].update(schedule="1" + "_128" * 63))
    assert flexvar("inspect", bundle_copy).code == 0
    assert flexvar("generate", bundle_copy, "--classes", 0, "-o", tmp_path / "made").code == 6
