"""`make demo` leaves what it promises, and the README's quick start generates from it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from graph_cache import GraphCache
from PIL import Image

import flexvar_ref
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints
from flexvar_runtime import Bundle

ROOT = Path(__file__).parents[2]


def with_tiny_weights(folder: Path) -> Path:
    """A copy of the demo whose twelve classes are those of an untrained model of the tests' size."""
    shutil.copytree(ROOT / "demo", folder, ignore=shutil.ignore_patterns("out", "__pycache__"))
    pair = flexvar_ref.load(*write_checkpoints(folder, tiny_transformer(classes=12), TINY_TOKENIZER))
    for network, name in zip(pair, ("transformer", "vae"), strict=True):
        flexvar_ref.save(network, folder / "model" / f"{name}.safetensors")
    return folder


def quick_start() -> list[str]:
    """The lines of the README's first block of commands."""
    [block, *_] = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return block.splitlines()


@pytest.mark.parametrize("weights", ["tiny", pytest.param("trained", marks=pytest.mark.slow)])
def test_demo_leaves_pictures_and_a_parity_table(weights: str, graph_cache: GraphCache, tmp_path: Path) -> None:
    demo, environment = ROOT / "demo", dict(os.environ)
    if weights == "tiny":
        demo, environment = with_tiny_weights(tmp_path / "demo"), environment | graph_cache.environment
    out = tmp_path / "demo" / "out"
    command = [sys.executable, str(demo / "run.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == str(out / "demo.bundle")
    parity = json.loads((out / "parity.json").read_text())["parity"]
    assert parity["passed"]
    assert {row["graph"] for row in parity["rows"]} == {"condition", "step", "prefill", "decode", "encode"}
    defaults = Bundle.open(out / "demo.bundle").manifest.defaults
    assert (defaults.top_k, defaults.top_p, defaults.greedy_scales) == (0, 0.8, "none")  # those of its card
    images = sorted(out.glob("images/*/*.png"))
    assert len(images) == 3 * 12 + 8 + 6  # three schedules of all classes, eight images of 3:2, six of twice the size
    sizes = {Image.open(path).size for path in images}
    assert any(width != height for width, height in sizes), "one schedule is not square"
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 12 * 64
    for word in ("relative_err", "s per image", "contact_sheet.png"):
        assert word in done.stdout

    generate = shlex.split(quick_start()[-1])
    assert generate.pop(0) == ".venv-demo/bin/flexvar"
    subprocess.run([Path(sys.executable).with_name("flexvar"), *generate], cwd=tmp_path, check=True)
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
