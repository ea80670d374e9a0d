"""The runtime works without torch and onnx, with what the `cpu` extra installs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexvar_runtime import FlexVARPipeline

BLOCKED = ("torch", "onnx", "onnxscript", "safetensors", "hypothesis", "pytest")
HOOK = f"""
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""
MAIN = """
from flexvar_runtime.cli.main import main
main(sys.argv[1:])
"""

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """A fresh interpreter in which nothing of BLOCKED can be imported."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HOOK + code, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_the_hook_blocks(python: Python) -> None:
    """Negative control."""
    code = """
import numpy
for name in ("torch", "onnx", "safetensors"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error.name)
import flexvar_ref; flexvar_ref.FlexVAR
"""
    done = python(code)
    assert done.stdout.split() == ["torch", "onnx", "safetensors"] and "No module named 'torch'" in done.stderr


def test_generate(python: Python, tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", tiny_bundle, "-o", "out", "--classes", "3,7", "--schedule", "1_2_3x4_6", "--seed", 5)
    done = python(MAIN, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    written = [np.asarray(Image.open(tmp_path / image["file"])) for image in json.loads(done.stdout)["images"]]
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        np.testing.assert_array_equal(np.stack(written), pipeline([3, 7], "1_2_3x4_6", seed=5).images)


def test_the_other_commands(python: Python, tiny_bundle: Path, tmp_path: Path) -> None:
    """Those of the runtime work. Export names the extra that it needs."""
    (tmp_path / "any.pth").touch()
    code = """
from flexvar_runtime.cli.main import main
export = ["export", "any.pth", "--vae", "any.pth", "-o", "out.bundle"]
for command in (["doctor"], ["inspect", sys.argv[1]], ["--help"], export):
    try:
        main(command)
    except SystemExit as end:
        print("ended", end.code)
"""
    done = python(code, tiny_bundle)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == ["ended 0", "ended 0", "ended 0", "ended 4"]
    assert "pip install 'flexvar-deploy[cpu,export]'" in done.stderr


def test_encode_and_decode(python: Python, tiny_bundle: Path) -> None:
    code = """
import numpy as np
from flexvar_runtime import FlexVARPipeline
with FlexVARPipeline.from_bundle(sys.argv[1]) as pipe:
    tokens = pipe.encode(np.zeros((16, 24, 3), np.uint8))
    print(pipe.decode(tokens).shape, tokens.shape)
"""
    assert python(code, tiny_bundle).stdout == "(1, 16, 24, 3) (1, 4, 6)\n"


def test_import_loads_no_backend(python: Python, record_property: Callable[[str, object], None]) -> None:
    """The time is only reported, because it depends on the machine."""
    code = """
import time
start = time.perf_counter()
import flexvar_runtime
seconds = time.perf_counter() - start
heavy = {"torch", "onnx", "onnxruntime", "onnxscript", "safetensors", "typer", "rich"} & sys.modules.keys()
print(seconds, *sorted(heavy))
"""
    runs = [python(code).stdout.split() for _ in range(3)]
    assert all(len(run) == 1 for run in runs), runs
    seconds = [float(run[0]) for run in runs]
    record_property("import_seconds_best_of_3", min(seconds))
    print(f"import flexvar_runtime: best of 3 {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s")
