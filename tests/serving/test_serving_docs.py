"""Everything that docs/serving.md shows with curl or Python is run. Its tables are those of the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from http_client import Running

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_its_commands_run(tiny_service: Running, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    ran = 0
    for language, text in BLOCK.findall(PAGE):
        # the names are those of the demo model, and its port is free only by chance
        text = text.replace("rainbow over hills", "8").replace("http://127.0.0.1:8000/", tiny_service.ready["url"])
        if "openai" in text and language == "python" and find_spec("openai") is None:
            continue
        command = (
            ["bash", "-euc", text.replace("curl -s", "curl -sf")]
            if language == "bash"
            else [sys.executable, "-c", text]
        )
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += language == "bash"
    assert ran == 5
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert [image["index"] for image in answer["data"]] == ["0", "1"] and answer["seed"] == "4"
    with Image.open(tmp_path / "wide.png") as wide, Image.open(tmp_path / "edited.png") as edited:
        assert wide.size == (96, 64) and edited.format == "PNG"
    assert (tmp_path / "events.txt").read_text().count("event: ") == 4


def test_its_tables_name_every_field_metric_and_status() -> None:
    pytest.importorskip("fastapi")
    from flexvar_serving.images.fields import EditFields
    from flexvar_serving.metrics import Metrics
    from flexvar_serving.web.schema import ERRORS

    for name in EditFields.model_fields:
        assert f"`{name}`" in PAGE, name
    families = [family.name for family in Metrics().registry.collect()]
    assert len(families) > 10
    for name in families:
        assert f"`{name}" in PAGE, name
    rows = re.findall(r"^\| ([0-9, ]+) \|", PAGE, flags=re.MULTILINE)
    assert {int(status) for row in rows for status in row.split(",")} == set(ERRORS)
