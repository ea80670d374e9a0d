"""What comes out of the cache is what an export would have written, and what an export alone can tell is left to it."""

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
WHOSE = """
from flexvar_export import bundle, onnx_graphs
print(bundle.export_graph.__module__, onnx_graphs.export_graph is bundle.export_graph)
"""


@pytest.fixture(scope="module")
def pair(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same sizes, other weights."""
    return flexvar_ref.load(
        *write_checkpoints(tmp_path_factory.mktemp("other"), tiny_transformer(), TINY_TOKENIZER, seed=1)
    )


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the graphs that were exported for real."""
    files: list[str] = []

    def export(module: nn.Module, spec: GraphSpec, directory: Path, weights_of: GraphSpec | None = None) -> None:
        files.append(spec.file)
        export_graph(module, spec, directory, weights_of)

    monkeypatch.setattr(caching, "export_for_real", export)
    return files


def test_a_graph_with_other_weights_is_the_one_an_export_writes(
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
    assert len(real) <= 1, "only the first, if no other test was before it"
    assert written["cached"] == written["exported"] != written["first"]


def test_what_makes_another_graph_is_another_form(pair: Pair, other: Pair) -> None:
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
    """Of its weight the exporter keeps what it computed with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.exp()


def test_a_graph_that_holds_what_was_made_of_weights_is_not_kept(real: list[str], tmp_path: Path) -> None:
    tensors = [(TensorSpec(name=name, dtype="float32", axes=("images", 64)),) for name in "xy"]
    spec = GraphSpec(file="folded.onnx", inputs=tensors[0], outputs=tensors[1])
    cache = GraphCache(tmp_path / "cache")
    cache.folder.mkdir()
    for _ in range(2):
        cache.export_graph(Folded(), spec, tmp_path)
    assert real == ["folded.onnx"] * 2


def ran(code: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ) | environment
    )
    return done.stdout.split()


def test_a_process_takes_its_graphs_from_there_where_it_is_told_to(graph_cache: GraphCache) -> None:
    assert ran(WHOSE, graph_cache.environment) == ["graph_cache", "True"]
    finders = "import sys; print(*(type(finder).__name__ for finder in sys.meta_path), 'torch' in sys.modules)"
    told, untold = ran(finders, graph_cache.environment), ran(finders, graph_cache.environment | {FOLDER: ""})
    assert told[0] == "CachedExports" and "CachedExports" not in untold
    assert told[-1] == untold[-1] == "False", "nothing is imported before it is needed"
