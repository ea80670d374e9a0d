"""The README's quick start in a fresh clone, and its two ways to install. Minutes: torch is large."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"pip install '[^']+'", README)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    arguments = [*map(str, command)]
    done = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def packages(programs: Path) -> set[str]:
    """The names of what is installed beside these programs."""
    return {row["name"] for row in json.loads(run(programs / "pip", "list", "--format=json", cwd=programs))}


def test_the_quick_start(tmp_path: Path) -> None:
    """In a clone of what is committed. Its environment has what it needs and no more, and `make clean` keeps it."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    [block, *_] = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    script = block.replace("<URL of this repository>", shlex.quote(str(ROOT)))
    output = run("bash", "-e", "-c", script, cwd=tmp_path, PYTHON=sys.executable)
    assert "==> .venv-demo: installing" in output and "\nbundle: demo/out/demo.bundle\n" in output
    clone = tmp_path / "flexvar-deploy"
    assert len(list((clone / "images").glob("*.png"))) == 2
    assert "\n. .venv-demo/bin/activate\n" in README
    activated = run("bash", "-e", "-c", ". .venv-demo/bin/activate\ncommand -v flexvar", cwd=clone)
    assert Path(activated.strip()) == clone / ".venv-demo" / "bin" / "flexvar"
    installed = packages(clone / ".venv-demo" / "bin")
    assert installed & {"torch", "onnx", "onnxruntime"} == {"torch", "onnx", "onnxruntime"}
    assert not installed & {"accelerate", "matplotlib", "mypy", "openvino", "pytest", "ruff", "tensorboard"}
    run("make", "clean", cwd=clone)
    assert (clone / ".venv-demo").is_dir() and not (clone / "demo" / "out").exists()
    assert run("git", "status", "--porcelain", cwd=clone) == "?? images/\n"


def test_the_readme_names_both() -> None:
    assert sorted(LINES) == ["pip install '.[cpu,export]'", "pip install '.[cpu]'"]


@pytest.mark.parametrize("line", LINES)
def test_install_and_generate(line: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """With `cpu` alone there is neither torch nor onnx, and it generates; with `export` the exporter is there too."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    run(programs / "pip", *shlex.split(line)[1:], "-c", ROOT / "constraints.txt", cwd=ROOT)
    installed = packages(programs)
    extra = {"torch", "onnx", "onnxscript", "safetensors"}
    assert installed & extra == (extra if "export" in line else set())
    run(programs / "flexvar", "generate", tiny_bundle, "--classes", "1", "-o", tmp_path / "images", cwd=tmp_path)
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
    run(programs / "flexvar", "verify" if "export" in line else "inspect", tiny_bundle, cwd=tmp_path)
