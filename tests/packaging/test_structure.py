"""The structure of the runtime: no import circles, layers that import only from earlier ones, and names that stay."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexvar_runtime.backends import BACKENDS

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "runtime": "flexvar_runtime",
    "export": "flexvar_export",
    "flexvar_ref": "flexvar_ref",
    "serving": "flexvar_serving",
    "evaluation": "flexvar_evaluation",
    "benchmarks": "flexvar_bench",
}
LAYERS = (  # as in CONTRIBUTING: a layer imports from its own row and the rows above it
    {"errors", "checks", "_version", "files", "machine"},
    {"model", "cuda"},
    {"bundle"},
    {"memory"},
    {"pictures", "backends"},
    {"request"},
    {"editing", "deadlines", "output"},
    {"generation"},
    {"pipeline"},
    {"public"},
    {"cli"},
)
TYPES_ONLY = {("deadlines", "generation")}  # for type checking: the base class of a pipeline names what a pipeline has
REEXPORTS = {"sampling", "photo", "manifest"}  # public import paths of modules that are in a layer's folder


def imported(path: Path, module: str, modules: set[str]) -> Iterator[str]:
    """Modules of the same package that a file imports, also those for type checking alone."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def import_graph(folder: Path, package: str) -> dict[str, set[str]]:
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        files[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return {module: {*imported(path, module, set(files))} - {module} for module, path in files.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := visit(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


@pytest.mark.parametrize(("folder", "package"), PACKAGES.items())
def test_no_import_circle(folder: str, package: str) -> None:
    graph = import_graph(ROOT / folder, package)
    assert len(graph) > 10 and circle(graph) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "layer").mkdir()
    for name, text in {
        "a.py": "from .layer import b\n",
        "layer/__init__.py": "",
        "layer/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..c import x\n",
        "c.py": "def late():\n    from . import a\n",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert sorted(circle(import_graph(tmp_path, "p"))) == ["p.a", "p.c", "p.layer.b"]


def test_layers_import_from_the_rows_above() -> None:
    row = {layer: i for i, layers in enumerate(LAYERS) for layer in layers}
    wrong = []
    for module, others in import_graph(ROOT / "runtime", "flexvar_runtime").items():
        layer = module.split(".")[1] if "." in module else ""
        if not layer or layer in REEXPORTS:
            continue
        for other in {other.split(".")[1] for other in others if "." in other}:
            if row[other] > row[layer] and (layer, other) not in TYPES_ONLY:
                wrong.append((module, other))
    assert wrong == []


@pytest.mark.parametrize(("layer", "above"), sorted(TYPES_ONLY))
def test_what_is_imported_for_types_is_not_loaded(layer: str, above: str) -> None:
    """Every import of the layer above, in any file, stands under `if TYPE_CHECKING:`."""
    everywhere, for_types = list[int](), list[int]()
    for path in sorted((ROOT / "runtime" / layer).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere += [id(path) for _ in imports_of(tree, above)]
        blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        for_types += [id(path) for block in blocks for statement in block.body for _ in imports_of(statement, above)]
    assert everywhere == for_types != []


def imports_of(tree: ast.AST, layer: str) -> Iterator[ast.ImportFrom]:
    """Imports of a layer in a file of another layer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if any(name == layer or name.startswith(f"{layer}.") for name in names):
                yield node


def test_no_backend_is_named_outside_backends() -> None:
    """A backend's name as a string decides something that belongs to the backend."""
    found = []
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        if "backends" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in BACKENDS:
                found.append((path.name, node.lineno, node.value))
    assert found == []


def test_the_pipeline_can_be_read_in_one_go() -> None:
    assert len((ROOT / "runtime/pipeline.py").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize(
    "path",
    [
        *["flexvar_runtime.sampling.probabilities", "flexvar_runtime.photo.read_photo", "flexvar_runtime.Bundle"],
        *["flexvar_runtime.manifest.Manifest", "flexvar_runtime.errors.FlexVARError", "flexvar_runtime.bundle.Bundle"],
        *["flexvar_ref.training.data.ImageFolder", "flexvar_ref.checkpoint.load_transformer"],
        *["flexvar_ref.checkpoint.save", "flexvar_ref.synthetic.tiny_transformer", "flexvar_ref.load"],
        *["flexvar_export.bundle_writer.write_bundle", "flexvar_export.bundle_writer.seal"],
    ],
)
def test_import_paths_that_stay(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
