"""`make demo` leaves what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_demo_leaves_pictures_and_a_parity_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "demo" / "run.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    parity = json.loads((out / "parity.json").read_text())["parity"]
    assert parity["passed"]
    assert {row["graph"] for row in parity["rows"]} == {"condition", "step", "prefill", "decode", "encode"}
    images = sorted(out.glob("images/*/*.png"))
    assert len(images) == 3 * 12 + 8 + 6  # three schedules of all classes, eight images of 3:2, six of twice the size
    sizes = {Image.open(path).size for path in images}
    assert any(width != height for width, height in sizes), "one schedule is not square"
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 12 * 64
    for word in ("relative_err", "s per image", "contact_sheet.png"):
        assert word in done.stdout
