"""Engines of d16 for six of the published schedules, in half precision, built with TensorRT-RTX without a GPU.

d16 is the smallest published size. Each build runs in its own process, whose peak memory is measured. The tests take
about ten minutes, and 6 GB of memory and disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_export.bundle import TORCH_PRECISIONS, UNPROVEN
from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import export_graph
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_runtime import Bundle
from flexvar_runtime.bundle.manifest import Manifest, Provenance
from flexvar_runtime.model.schedule import PUBLISHED
from flexvar_runtime.model.signatures import SCHEMA_VERSION, WEIGHTS_OF, graph_specs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3600)]

MEMORY = 6e9  # bytes
A_PROFILE = 20e6  # bytes of an engine for each profile, besides its weights
TEN = "1_2_3_4_5_6_8_10_13_16"
TEN_STEPS = 180.0  # seconds, on two cores
SIX = ("6", "8", "9", "10", "13", "512px")  # 32 shapes; all nine schedules have 44
HALF = {"fp16": "float16", "bf16": "bfloat16"}
RUN = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps({**json.loads(done.stdout), "peak_bytes": peak, "total_seconds": time.monotonic() - start}))
"""


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> a bundle of d16 with random weights, without a proof."""
    tokenizer = Tokenizer(TokenizerConfig()).eval()
    model = FlexVAR(TransformerConfig.published(16), tokenizer.codebook_VD).eval()
    root = tmp_path_factory.mktemp("d16")

    def bundle(precision: str) -> Path:
        path = root / f"{precision}.bundle"
        if not path.exists():
            facts = model_facts(model, tokenizer)
            specs = graph_specs(facts, precision)
            with write_bundle(path) as directory:
                for graph, spec in specs.items():
                    module = graph_module(graph, model, tokenizer, TORCH_PRECISIONS[precision])
                    export_graph(module, spec, directory, specs.get(WEIGHTS_OF.get(graph, "")))
                manifest = Manifest(
                    schema_version=SCHEMA_VERSION,
                    precision=precision,
                    model=facts,
                    graphs=specs,
                    defaults=PUBLISHED_DEFAULTS,
                    provenance=Provenance(transformer_sha256="0" * 64, tokenizer_sha256="0" * 64, tools={}),
                    parity=UNPROVEN,
                    largest_activation={},
                    files={},
                )
                seal(directory, manifest)
        return path

    return bundle


def build(bundle: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    flexvar = Path(sys.executable).with_name("flexvar")
    command = [
        flexvar,
        "build",
        bundle,
        "--backend",
        "tensorrt-rtx",
        "--engines",
        tmp_path,
        "--allow-unproved",
        "--json",
    ]
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path / "state"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, command), "--engines", str(tmp_path)],
        stdout=subprocess.PIPE,
        check=True,
        env=environment,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def check(result: dict[str, Any], bundle: Bundle, precision: str) -> None:
    assert result["peak_bytes"] < MEMORY
    for engine in result["engines"]:
        weights = sum(bundle.manifest.files[name].size for name in bundle.graph_files(engine["graph"]))
        assert engine["size_bytes"] <= weights + A_PROFILE * len(engine["profiles"])
        assert engine["precision"]["claimed"] == HALF[precision] and engine["precision"]["share"] >= 0.95
    step = result["engines"][-1]
    assert step["graph"] == "step" and step["precision"]["fused_attention"] == 16


@pytest.mark.parametrize("precision", HALF)
def test_given_scales_in_one_pass(bundles: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    """The engine of `prefill` holds the weights of `step` a second time. Schedules go up to 512 px."""
    schedules = [part for text in (TEN, "512px", "1_2_3x5_12x20") for part in ("--schedule", text)]
    result = build(bundles(precision), tmp_path, "--prefill", *schedules)
    check(result, Bundle.open(bundles(precision), allow_unproved=True), precision)
    graphs = [engine["graph"] for engine in result["engines"]]
    assert graphs == ["condition", "decode", "encode", "prefill", "step"]


@pytest.mark.parametrize("precision", HALF)
def test_ten_steps(bundles: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    result = build(bundles(precision), tmp_path)
    check(result, Bundle.open(bundles(precision), allow_unproved=True), precision)
    assert [len(engine["profiles"]) for engine in result["engines"]] == [1, 2, 2, 11]
    assert result["engines"][-1]["seconds"] < TEN_STEPS


@pytest.mark.parametrize("precision", HALF)
def test_six_published_schedules(bundles: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    schedules = [part for name in SIX for part in ("--schedule", PUBLISHED[name])]
    result = build(bundles(precision), tmp_path, *schedules)
    check(result, Bundle.open(bundles(precision), allow_unproved=True), precision)
    assert [len(engine["profiles"]) for engine in result["engines"]] == [1, 3, 3, 33]
