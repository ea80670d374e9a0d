"""The README's two ways to install, each into an environment of its own. Minutes: torch is large."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = re.findall(r"pip install '[^']+'", (ROOT / "README.md").read_text())

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_names_both() -> None:
    assert sorted(LINES) == ["pip install '.[cpu,export]'", "pip install '.[cpu]'"]


@pytest.mark.parametrize("line", LINES)
def test_install_and_generate(line: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """With `cpu` alone there is neither torch nor onnx, and it generates; with `export` the exporter is there too."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    run(programs / "pip", *shlex.split(line)[1:], "-c", ROOT / "constraints.txt", cwd=ROOT)
    installed = {row["name"] for row in json.loads(run(programs / "pip", "list", "--format=json", cwd=tmp_path))}
    extra = {"torch", "onnx", "onnxscript", "safetensors"}
    assert installed & extra == (extra if "export" in line else set())
    run(programs / "flexvar", "generate", tiny_bundle, "--classes", "1", "-o", tmp_path / "images", cwd=tmp_path)
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
    run(programs / "flexvar", "verify" if "export" in line else "inspect", tiny_bundle, cwd=tmp_path)
