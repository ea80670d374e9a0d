"""A graph from the cache equals the result of an export, and graphs that depend on values are not cached."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import graph_cache as caching
import pytest
import torch
from graph_cache import FOLDER, GraphCache, form
from torch import Tensor, nn

import flexvar_ref
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import export_graph
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints
from flexvar_runtime.model.signatures import CONDITION, STEP, graph_specs
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

Pair = tuple[FlexVAR, Tokenizer]
EXPORTER_MODULE = """
from flexvar_export import bundle, onnx_graphs
print(bundle.export_graph.__module__, onnx_graphs.export_graph is bundle.export_graph)
"""


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model of the same sizes with other weights."""
    return flexvar_ref.load(
        *write_checkpoints(tmp_path_factory.mktemp("other"), tiny_transformer(), TINY_TOKENIZER, seed=1)
    )


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of the graphs that were really exported."""
    files: list[str] = []

    def export(module: nn.Module, spec: GraphSpec, directory: Path, weights_of: GraphSpec | None = None) -> None:
        files.append(spec.file)
        export_graph(module, spec, directory, weights_of)

    monkeypatch.setattr(caching, "export_for_real", export)
    return files


def test_a_cached_graph_with_other_weights_equals_an_export(
    pair: Pair, other: Pair, graph_cache: GraphCache, real: list[str], tmp_path: Path
) -> None:
    from flexvar_export.facts import model_facts

    spec = graph_specs(model_facts(*pair), "fp32")[CONDITION]
    written = {}
    for name in ("first", "cached", "exported"):
        folder = tmp_path / name
        folder.mkdir()
        network = pair if name == "first" else other
        export = export_graph if name == "exported" else graph_cache.export_graph
        export(graph_module(CONDITION, *network, torch.float32), spec, folder)
        written[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(real) <= 1, "only the first graph, unless another test exported it before"
    assert written["cached"] == written["exported"] != written["first"]


def test_different_graphs_have_different_forms(pair: Pair, other: Pair) -> None:
    def of(network: Pair, graph: str = STEP, *how: object) -> str:
        return form(graph_module(graph, *network, *(how or (torch.float16,))), "")  # type: ignore[arg-type]

    assert of(pair) == of(other) == of(copy.deepcopy(pair))
    single = copy.deepcopy(pair)
    with torch.no_grad():
        single[0].get_parameter("head.bias").fill_(1)
    forms = [
        of(pair),
        of(pair, STEP, torch.bfloat16),
        of(pair, STEP, torch.float16, ["blocks.0.mlp"]),
        of(pair, "prefill"),
        of(pair, "decode", torch.float16, [], "plain"),
        of(pair, "decode", torch.float16, [], "phases"),
        of(single),
        form(graph_module(STEP, *pair, torch.float16), "another declaration"),
    ]
    assert len(set(forms)) == len(forms)


class Folded(nn.Module):
    """A module whose weight the exporter replaces by a constant computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.exp()


def test_a_graph_with_constants_computed_from_weights_is_not_cached(real: list[str], tmp_path: Path) -> None:
    tensors = [(TensorSpec(name=name, dtype="float32", axes=("images", 64)),) for name in "xy"]
    spec = GraphSpec(file="folded.onnx", inputs=tensors[0], outputs=tensors[1])
    cache = GraphCache(tmp_path / "cache")
    cache.folder.mkdir()
    for _ in range(2):
        cache.export_graph(Folded(), spec, tmp_path)
    assert real == ["folded.onnx"] * 2


def run_python(code: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ) | environment
    )
    return done.stdout.split()


def test_a_process_uses_the_cache_if_its_environment_says_so(graph_cache: GraphCache) -> None:
    assert run_python(EXPORTER_MODULE, graph_cache.environment) == ["graph_cache", "True"]
    finders = "import sys; print(*(type(finder).__name__ for finder in sys.meta_path), 'torch' in sys.modules)"
    cached, plain = (run_python(finders, graph_cache.environment | extra) for extra in ({}, {FOLDER: ""}))
    assert cached[0] == "CachedExports" and "CachedExports" not in plain
    assert cached[-1] == plain[-1] == "False", "torch is not imported before it is needed"
