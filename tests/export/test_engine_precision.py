"""A network must compute in the precision that its bundle claims, except the declared float32 parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graph_cache import GraphCache
from onnx import TensorProto, helper

from flexvar_export.bundle_writer import seal
from flexvar_export.engine_builder import build_engine
from flexvar_export.engine_precision import Layer, inspect_precision, prove_precision
from flexvar_export.modules import graph_module
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.backends.tensorrt.engine_files import EngineId, PrecisionReport
from flexvar_runtime.backends.tensorrt.library import TrtLibrary
from flexvar_runtime.model.signatures import graph_specs

EngineIds = Callable[..., EngineId]

# Graphs parsed by TensorRT-RTX


def claimed(path: Path, precision: str) -> Bundle:
    """The bundle with a manifest that claims another precision."""
    manifest = Bundle.open(path).manifest
    return seal(path, replace(manifest, precision=precision, graphs=graph_specs(manifest.model, precision)))


@pytest.mark.parametrize(
    ("graph", "layers", "islands"),
    [
        ("condition", "0 of 3", ()),
        ("step", "0 of 16", ("codes",)),
        ("decode", "0 of ", ()),
        ("encode", "0 of ", ("image", "latent")),
    ],
)
def test_a_float32_graph_with_a_manifest_of_half_precision_is_refused(
    bundle_copy: Path, library: TrtLibrary, engine_id: EngineIds, graph: str, layers: str, islands: tuple[str, ...]
) -> None:
    bundle = claimed(bundle_copy, "fp16")
    with pytest.raises(ArtifactRefused, match=rf"^{graph} .*{layers}.* in float32") as refusal:
        build_engine(library, bundle, engine_id(bundle, graph))
    assert all(f" at {name}" in refusal.value.expected for name in islands)
    assert "--precision fp16" in refusal.value.fix


def test_one_layer_in_float32_is_refused_and_named(
    spoil: Callable[..., Bundle], library: TrtLibrary, engine_id: EngineIds
) -> None:

    def widen(model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        at, node = next(
            (i, n) for i, n in enumerate(nodes) if n.op_type == "MatMul" and "blocks.1.fc1.weight" in n.input
        )
        casts = [helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT) for name in node.input]
        back = helper.make_node("Cast", ["wide"], list(node.output), to=TensorProto.FLOAT16)
        node.input[:], node.output[:] = [cast.output[0] for cast in casts], ["wide"]
        for cast in casts:
            nodes.insert(at, cast)
        nodes.insert(at + 3, back)

    bundle = spoil("step", widen, "fp16")
    with pytest.raises(ArtifactRefused, match=r"step .* 14 of 16 .*\(matmul node_\S+ in float32\)"):
        build_engine(library, bundle, engine_id(bundle, "step"))


@pytest.mark.parametrize(
    ("graph", "matmuls", "fused"),
    [("step", {"float16": 7, "float32": 9}, 1), ("prefill", {"float16": 2, "float32": 9}, 0)],
)
def test_parts_kept_in_float32_must_be_those_of_the_manifest(
    graph_cache: GraphCache,
    tiny_pair: tuple[FlexVAR, Tokenizer],
    tiny_bundles: Callable[[str], Path],
    library: TrtLibrary,
    engine_id: EngineIds,
    tmp_path: Path,
    graph: str,
    matmuls: dict[str, int],
    fused: int,
) -> None:
    """A graph may keep no more than the manifest lists, and the step no less."""
    kept = ("blocks.0.attention", "blocks.0.mlp")
    path = tmp_path / "bundle"
    path.mkdir()
    manifest = Bundle.open(tiny_bundles("fp16")).manifest
    graphs = {name: manifest.graphs[name] for name in ("step", "prefill")}
    for name, spec in graphs.items():
        module = graph_module(name, *tiny_pair, torch.float16, kept)
        graph_cache.export_graph(module, spec, path, graphs["step"] if name == "prefill" else None)

    def build(parts: tuple[str, ...]) -> PrecisionReport:
        named = replace(manifest, graphs=graphs, largest_activation={}, float32_parts=parts)
        bundle = seal(path, named)
        return build_engine(library, bundle, engine_id(bundle, graph)).precision

    report = build(kept)
    assert report.layers["matmul"] == matmuls and report.fused_attention == fused
    with pytest.raises(ArtifactRefused, match=rf"^{graph} .*blocks\.0\.attention"):
        build(kept[:1])
    if graph == "step":
        with pytest.raises(ArtifactRefused, match=r"blocks\.1\.mlp"):
            build((*kept, "blocks.1.mlp"))


# The rules alone


def test_attention_must_stay_fused() -> None:
    layers = [Layer(str(i), "attention", "float16", frozenset(), i != 1) for i in range(3)]
    with pytest.raises(ArtifactRefused, match=r"^step .* 2 of them fused.* 3, all fused"):
        prove_precision("step", "fp16", layers, 3)
    with pytest.raises(ArtifactRefused, match=r"^decode has 3 .* needs 4"):
        prove_precision("decode", "fp16", layers, 4)
    assert prove_precision("decode", "fp16", layers, 3).fused_attention == 2
    with pytest.raises(ArtifactRefused, match=r"^decode .* 0 of 0 "):
        prove_precision("decode", "fp16", [], 0)


def test_only_the_declared_island_may_be_float32() -> None:
    """Not any other layer of its kind."""
    half = Layer("a", "matmul", "float16", frozenset(), False)
    island = Layer("b", "matmul", "float32", frozenset({"codes"}), False)
    prove_precision("step", "fp16", [half, island], 0)
    for wrong in (replace(island, border=frozenset({"t"})), replace(island, kind="convolution")):
        with pytest.raises(ArtifactRefused):
            prove_precision("step", "fp16", [half, island, wrong], 0)
    with pytest.raises(ArtifactRefused):  # and the island must be float32
        prove_precision("step", "fp16", [half, replace(island, dtype="float16")], 0)


# The engine inspector's report of a finished engine


def kernel(kind: str, dtype: str, tactic: str = "") -> dict[str, Any]:
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [2, 4, 1024], "Format/Datatype": dtype}
    return {"Name": f"{kind}_myl0_3", "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}


def test_kernels_by_kind_and_type() -> None:
    rows = [
        kernel("gemm", "Half", "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize64x64x64"),
        kernel("gemm", "Float", "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x8"),
        kernel("kgen", "Half", "_gemm_mha_v2_0x5a3c"),
        kernel("kgen", "Float", "__myl_CastMeanSubMulMeanAddSqrtDivMul_0xf2543c36ff9f104b"),
        kernel("CaskConvolution", "Channel major FP16 format where channel % 8 == 0", "sm80_xmma_fprop_implicit_gemm"),
        kernel("CaskConvolution", "Row major linear FP32"),
        kernel("MatrixMultiply", "BFloat16"),
        kernel("Reformat", "Half"),
        kernel("signal", ""),
        {"Name": "wait", "LayerType": "wait", "Inputs": []},
    ]
    report = inspect_precision(json.dumps({"Layers": rows, "Bindings": ["codes", "logits"]}), "float16")
    assert report.layers == {
        "matmul": {"bfloat16": 1, "float16": 1, "float32": 1},
        "convolution": {"float16": 1, "float32": 1},
        "attention": {"float16": 1},
    }
    assert report.fused_attention == 1 and report.share == 0.5


@pytest.mark.parametrize(
    "text",
    ['{"Layers": ["step"], "Bindings": []}', "[]", "{}", '{"Layers": []}', '{"Layers": {}}', "no text", '{"Layers": ['],
)
def test_a_report_without_typed_layers_is_refused(text: str) -> None:
    """An engine that was built without detailed verbosity reports layer names alone."""
    with pytest.raises(ArtifactRefused):
        inspect_precision(text, "float16")
