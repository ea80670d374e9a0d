"""The import directions of the map in CONTRIBUTING, and what `import flexvar_runtime` may load."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"flexvar_ref", "flexvar_runtime", "flexvar_export", "flexvar_serving", "flexvar_evaluation", "flexvar_bench"}
FOLDER_NAMES = {
    "runtime",
    "export",
    "serving",
    "evaluation",
    "benchmarks",
    "tests",
}  # names on disk that are no import names
HEAVY = {"torch", "onnx", "onnxruntime", "safetensors", "typer", "fastapi", "uvicorn", "pydantic"}


@dataclass(frozen=True)
class Layer:
    name: str
    may_import: frozenset[str]  # of ours
    third_party: frozenset[str] | None = None  # None: anything that is installed
    backends: frozenset[str] = frozenset()  # third party, in backends/ and cuda/ only


LAYERS = {
    "flexvar_ref": Layer(
        "flexvar_ref",
        frozenset(),
        frozenset({"torch", "numpy", "safetensors"}),
        frozenset({"PIL", "accelerate", "rich", "tensorboard", "typer"}),  # in training/
    ),
    "runtime": Layer(
        "flexvar_runtime",
        frozenset(),
        frozenset({"numpy", "PIL", "typer", "rich"}),
        frozenset(
            {"onnxruntime", "openvino", "cuda", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"}
            | {"onnxruntime_ep_nv_tensorrt_rtx", "nvmath", "cudnn"}
        ),
    ),
    "export": Layer("flexvar_export", frozenset({"flexvar_ref", "flexvar_runtime"})),
    "serving": Layer(
        "flexvar_serving",
        frozenset({"flexvar_runtime"}),
        frozenset({"numpy", "PIL", "typer"})
        | {"fastapi", "isal", "prometheus_client", "pydantic", "starlette", "uvicorn"},  # the extra serve
    ),
    "evaluation": Layer(
        "flexvar_evaluation",
        frozenset({"flexvar_runtime"}),
        frozenset({"numpy", "PIL", "rich", "typer", "jinja2", "matplotlib", "threadpoolctl"}),
        frozenset({"onnx"}),  # in network/
    ),
    "benchmarks": Layer(
        "flexvar_bench", frozenset({"flexvar_ref", "flexvar_runtime", "flexvar_export", "flexvar_evaluation"})
    ),
}


def absolute_imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and module of every absolute import, also those in functions and behind importlib."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ) if not module.startswith("."):
                yield node.lineno, module


def violations(folder: str, path: Path, source: str) -> Iterator[str]:
    layer = LAYERS[folder]
    third_party = layer.third_party
    if third_party is not None and {"backends", "cuda", "training", "network"} & set(path.parts):
        third_party |= layer.backends
    for line, module in absolute_imports(source):
        top = module.partition(".")[0]
        if top == layer.name:
            complaint = "inside a package imports are relative"
        elif top in FOLDER_NAMES:
            complaint = "that is a folder, not an import name"
        elif top in OURS:
            if top in layer.may_import:
                continue
            complaint = f"of ours {layer.name} may import {sorted(layer.may_import) or 'nothing'}"
        elif third_party is None or top in sys.stdlib_module_names or top in third_party:
            continue
        else:
            complaint = f"here {layer.name} may import {sorted(third_party)} and the standard library"
        yield f"{path}:{line}: imports {module}; {complaint}"


@pytest.mark.parametrize("folder", LAYERS)
def test_import_directions(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = [v for s in sources for v in violations(folder, s.relative_to(ROOT), s.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("runtime/bad.py", "import torch.nn as nn", "imports torch.nn"),
        ("runtime/bad.py", "def late():\n    from onnx import helper", ":2: imports onnx"),
        (
            "runtime/bad.py",
            "import importlib\nimportlib.import_module('flexvar_export.commands')",
            "may import nothing",
        ),
        ("runtime/bad.py", "from flexvar_runtime.errors import FlexVARError", "imports are relative"),
        ("runtime/bad.py", "import onnxruntime", "imports onnxruntime"),
        ("flexvar_ref/bad.py", "import flexvar_runtime", "may import nothing"),
        ("flexvar_ref/bad.py", "import onnx", "imports onnx"),
        ("serving/bad.py", "import flexvar_export", "may import ['flexvar_runtime']"),
        ("export/bad.py", "from flexvar_bench import roofline", "['flexvar_ref', 'flexvar_runtime']"),
        ("benchmarks/bad.py", "from runtime.errors import FlexVARError", "a folder, not an import name"),
    ],
)
def test_a_wrong_direction_is_found(path: str, source: str, message: str) -> None:
    [found] = violations(path.partition("/")[0], Path(path), source)
    assert message in found


def test_a_right_direction_passes() -> None:
    backend = "import ctypes\n\nimport numpy as np\nimport onnxruntime\n\nfrom ..errors import FlexVARError\n"
    assert not list(violations("runtime", Path("runtime/backends/good.py"), backend))
    assert not list(violations("export", Path("export/good.py"), "import onnx\nimport flexvar_ref\n"))


BANNED = {
    "runtime": ["torch", "onnx", "onnxscript", "safetensors", "flexvar_ref", "flexvar_export", "flexvar_bench"],
    "flexvar_ref": ["onnx", "onnxruntime", "flexvar_runtime", "flexvar_export", "flexvar_bench"],
    "export": ["flexvar_bench"],
}


def test_ruff_bans_the_wrong_directions(tmp_path: Path) -> None:
    """Each ban is reported, in an import of the module and of a name below it; permitted imports are not."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    expected = set()
    for folder, modules in BANNED.items():
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / folder / "ruff.toml", tmp_path / folder)
        (tmp_path / folder / "good.py").write_text("import numpy as np\n\nx = np.zeros(3)\n", encoding="utf-8")
        for module in modules:
            bad = tmp_path / folder / f"bad_{module}.py"
            bad.write_text(f"import {module}\nfrom {module}.below import name\n", encoding="utf-8")
            expected |= {(f"{folder}/{bad.name}", 1), (f"{folder}/{bad.name}", 2)}
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", "."]
    report = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert report.returncode == 1, report.stderr
    rows = [(Path(row["filename"]), row["location"]["row"], row["code"]) for row in json.loads(report.stdout)]
    banned = {(file.relative_to(tmp_path.resolve()).as_posix(), row) for file, row, code in rows if code == "TID251"}
    assert banned == expected
    assert not [row for row in rows if row[0].name == "good.py"]


def loaded_after(statement: str, cwd: Path, watched: set[str]) -> set[str]:
    """Which of the watched modules a fresh interpreter holds after the statement."""
    probe = f"{statement}\nimport sys\nprint(*sorted({watched!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-I", "-c", probe], cwd=cwd, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_runtime_is_cheap(tmp_path: Path) -> None:
    assert loaded_after("import flexvar_runtime", tmp_path, HEAVY) == set()


def test_the_probe_sees_a_heavy_import(tmp_path: Path) -> None:
    assert loaded_after("import flexvar_runtime, safetensors", tmp_path, HEAVY) == {"safetensors"}


def test_the_command_line_composes_without_torch(tmp_path: Path) -> None:
    """The commands of every package register where only the runtime's dependencies are installed."""
    register = (
        "import importlib.metadata, typer\n"
        "points = importlib.metadata.entry_points(group='flexvar.commands')\n"
        "assert {point.name for point in points} >= {'runtime', 'export'}, points\n"
        "for point in points: point.load()(typer.Typer())"
    )
    assert loaded_after(register, tmp_path, HEAVY | {"onnxscript"}) == {"typer"}
