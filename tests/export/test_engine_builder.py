"""Engines of every graph, built by the real TensorRT-RTX, which needs no GPU for it; TensorRT is played by a fake."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from graph_cache import GraphCache
from onnx import TensorProto, helper

from flexvar_export import engine_builder
from flexvar_export.bundle import TORCH_PRECISIONS, UNPROVEN
from flexvar_export.bundle_writer import seal
from flexvar_export.engine_builder import build_engine, supported_targets
from flexvar_export.engine_precision import Layer, inspect_precision, prove_precision
from flexvar_export.engine_profiles import profiles, step_pairs
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts
from flexvar_export.modules import graph_module
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_runtime import ArtifactRefused, BackendUnavailable, Bundle, InvalidInput, OutOfMemory, ScaleSchedule
from flexvar_runtime.backends.tensorrt.engine_files import (
    PORTABLE,
    RECIPE,
    EngineId,
    PrecisionReport,
    graph_sha256,
)
from flexvar_runtime.backends.tensorrt.library import TrtLibrary, load
from flexvar_runtime.bundle.manifest import Manifest, Provenance
from flexvar_runtime.bundle.onnx_scan import Node, scan
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.schedule import PUBLISHED
from flexvar_runtime.model.signatures import (
    CONDITION,
    DECODE,
    ENCODE,
    GRAPHS,
    PREFILL,
    SCHEMA_VERSION,
    STEP,
    graph_specs,
)

Spoil = Callable[..., Bundle]
TEN_STEPS = [ScaleSchedule.parse(PUBLISHED["10"])]
SMALL = [ScaleSchedule.parse("1_2x3")]
ALL = [ScaleSchedule.parse(text) for text in PUBLISHED.values()]
MB_A_PROFILE = 20
D16 = ModelFacts(
    depth=16,
    width=1024,
    heads=16,
    head_size=64,
    classes=1000,
    class_names=None,
    null_class=1000,
    vocabulary=8912,
    code_dim=32,
    downsampling=16,
    value_range=(-1.0, 1.0),
    position_side=32,
)


@pytest.fixture(scope="module")
def library() -> TrtLibrary:
    return load("tensorrt-rtx")


def engine_id(
    library: TrtLibrary,
    bundle: Bundle,
    graph: str,
    schedules: list[ScaleSchedule] = SMALL,
    max_batch: int = 2,
    target: str = PORTABLE,
) -> EngineId:
    return EngineId(
        graph=graph,
        graph_sha256=graph_sha256(bundle, graph),
        recipe=RECIPE,
        flavour=library.flavour,
        version=library.version,
        target=target,
        profiles=profiles(graph, schedules, max_batch, bundle.manifest.model),
    )


# Profiles


def test_published_pairs() -> None:
    """32 distinct shapes serve everything that is published, 512 px included."""
    assert len(step_pairs(ALL)) == 32
    assert step_pairs(TEN_STEPS)[-1] == (256, 424)
    assert step_pairs([ScaleSchedule.parse("1_2x3")]) == [(1, 0), (6, 1)]


@pytest.mark.parametrize("schedules", [TEN_STEPS, SMALL, ALL, [ScaleSchedule.parse("1")]])
def test_step_profiles_serve_what_was_asked_for(schedules: list[ScaleSchedule]) -> None:
    found = profiles("step", schedules, 4, D16)
    assert len(found) == len(step_pairs(schedules)) + 1
    for new, past in step_pairs(schedules):
        for images, branches in itertools.product((1, 3, 4), (1, 2)):
            sizes = {"new": new, "past": past, "images": images, "sequences": images * branches}
            first = next(profile for profile in found if profile.covers(sizes))
            assert first.axes["new"] == (new,) * 3 and first.axes["past"] == (past,) * 3  # the exact one
            assert found[-1].covers(sizes)
        assert not any(one.covers({"new": new, "past": past, "images": 5, "sequences": 5}) for one in found)


def test_a_single_query_with_few_heads() -> None:
    """There is no kernel for exactly one, whatever the batch; for one or two there is."""
    tiny = replace(D16, depth=2, heads=2, width=128)
    first, second, *_ = profiles("step", TEN_STEPS, 1, tiny)
    assert (first.axes["new"], first.axes["past"]) == ((1, 1, 2), (0, 0, 0))
    assert second.axes["new"] == (4, 4, 4) and profiles("step", TEN_STEPS, 1, D16)[0].axes["new"] == (1, 1, 1)


def test_the_wide_profile_serves_other_schedules() -> None:
    wide = profiles("step", TEN_STEPS, 1, D16)[-1]
    one = {"images": 1, "sequences": 2}
    for new, past in step_pairs([ScaleSchedule.parse(text) for text in ("1_2_4_6_10_16", "1_4x5_9x7_16x12")]):
        assert wide.covers({"new": new, "past": past, **one})
    assert not wide.covers({"new": 257, "past": 0, **one})


def test_profiles_of_the_other_graphs() -> None:
    [labels] = profiles("condition", ALL, 64, D16)
    assert labels.axes == {"labels": (16, 16, 16)}
    schedules = [*TEN_STEPS, ScaleSchedule.parse("1_2_12x20")]
    for graph in ("decode", "encode"):
        *exact, wide = profiles(graph, schedules, 64, D16)
        assert [profile.axes["height"] for profile in exact] == [(12, 12, 12), (16, 16, 16)]
        assert {profile.axes["images"] for profile in (*exact, wide)} == {(1, 1, 8)}  # more are run in parts
        assert wide.covers({"images": 8, "height": 20, "width": 1}) and wide.axes["height"][2] == 20
    assert profiles("decode", schedules, 3, D16)[0].axes["images"] == (1, 1, 3)


# The ONNX file


def test_scan(tmp_path: Path, tiny_bundles: Callable[[str], Path]) -> None:
    path = tiny_bundles("fp32") / "step.onnx"
    model, found = onnx.load(str(path), load_external_data=False), scan(path)
    assert found.nodes == tuple(
        Node(n.name, n.op_type, tuple(n.input), tuple(n.output), n.domain) for n in model.graph.node
    )
    assert found.weight_files == {"step.onnx.data"}


def test_scan_looks_into_subgraphs(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    inner = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v"], ["y"], name="hidden")],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph(
        [branch, helper.make_node("Constant", [], ["k"], value=weight)],
        "outer",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "graph.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    found = scan(path)
    assert [node.operator for node in found.nodes] == ["Attention", "Attention", "If", "Constant"]
    assert found.weight_files == {"../secret"}


@pytest.mark.parametrize("content", [b"no graph", b"\x3a\xff\x01", b"\x3a" + b"\xff" * 12, b"\x39\x00", b"\x3b"])
def test_scan_refuses(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graph.onnx").write_bytes(content)
    with pytest.raises(ArtifactRefused, match="expected a graph in ONNX form; fix: export the bundle again"):
        scan(tmp_path / "graph.onnx")


# At the width of d16: two blocks of it, and a tokenizer whose attention is as wide as the published one's


@pytest.fixture(scope="module")
def wide_bundles(graph_cache: GraphCache, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """(precision, graph) -> two blocks of d16, exported and not proved: a bundle of that one graph."""
    tokenizer = Tokenizer(TokenizerConfig(multipliers=(1, 4), encoder_blocks=1, decoder_blocks=1)).eval()
    model = FlexVAR(TransformerConfig(depth=2, heads=16), tokenizer.codebook_VD).eval()
    facts = model_facts(model, tokenizer)

    def bundle(precision: str, graph: str) -> Bundle:
        directory = tmp_path_factory.mktemp(f"wide_{precision}_{graph}")
        spec = graph_specs(facts, precision)[graph]
        module = graph_module(graph, model, tokenizer, TORCH_PRECISIONS[precision])
        graph_cache.export_graph(module, spec, directory)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision=precision,
            model=facts,
            graphs={graph: spec},
            defaults=PUBLISHED_DEFAULTS,
            provenance=Provenance(transformer_sha256="0" * 64, tokenizer_sha256="0" * 64, tools={}),
            parity=UNPROVEN,
            largest_activation={},
            files={},
        )
        return seal(directory, manifest)

    return bundle


HALVES = [("fp16", "float16"), ("bf16", "bfloat16")]
QUICK = [("fp16", CONDITION), ("fp16", PREFILL)]
LAYERS: dict[str, dict[str, dict[str, int]]] = {  # "half" is what the bundle claims
    "condition": {"matmul": {"half": 3}},
    "step": {"matmul": {"half": 13, "float32": 1}, "attention": {"half": 2}},
    "prefill": {"matmul": {"half": 8, "float32": 1}, "attention": {"half": 1}},
    "decode": {"convolution": {"half": 21}, "attention": {"half": 2}},
    "encode": {"convolution": {"half": 19, "float32": 2}, "attention": {"half": 2}},
}


FULL_WIDTH = [  # of the others, test_half_precision builds the same layers, smaller
    pytest.param(precision, dtype, graph, marks=() if (precision, graph) in QUICK else pytest.mark.slow)
    for precision, dtype in HALVES
    for graph in GRAPHS
]


@pytest.mark.parametrize(("precision", "dtype", "graph"), FULL_WIDTH)
def test_half_precision_at_full_width(
    wide_bundles: Callable[[str, str], Bundle], library: TrtLibrary, graph: str, precision: str, dtype: str
) -> None:
    """Every graph for the ten steps: built, in the precision it claims, attention of the transformer in one kernel."""
    bundle = wide_bundles(precision, graph)
    wanted = engine_id(library, bundle, graph, TEN_STEPS, 8)
    ticks: list[int] = []
    plan = build_engine(library, bundle, wanted, tick=lambda: ticks.append(1))
    assert len(ticks) == len(wanted.profiles) == {"step": 11, "decode": 2, "encode": 2}.get(graph, 1)
    weights = sum(bundle.manifest.files[name].size for name in bundle.graph_files(graph))
    assert weights < plan.data.nbytes < weights + MB_A_PROFILE * 1e6 * len(wanted.profiles)
    report = plan.precision
    expected = {
        kind: {dtype if name == "half" else name: count for name, count in counts.items()}
        for kind, counts in LAYERS[graph].items()
    }
    assert report.claimed == dtype and report.layers == expected
    fused = {"step": 2, "prefill": 1}  # its last block leaves keys and values only; heads of 512 have no kernel
    assert report.fused_attention == fused.get(graph, 0)
    float32 = {"step": 1 / 16, "prefill": 1 / 10, "encode": 2 / 23}
    assert report.share == pytest.approx(1 - float32.get(graph, 0), abs=1e-4)


# The tiny model: other precisions, and what is refused


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("precision", "dtype"), HALVES)
def test_half_precision(
    tiny_bundles: Callable[[str], Path], library: TrtLibrary, graph: str, precision: str, dtype: str
) -> None:
    """For the ten steps as at full width: built in the precision it claims. All attention is in one kernel: the
    tokenizer's is narrow enough here."""
    bundle = Bundle.open(tiny_bundles(precision))
    report = build_engine(library, bundle, engine_id(library, bundle, graph, TEN_STEPS, 8)).precision
    assert report.claimed == dtype
    assert report.fused_attention == {CONDITION: 0, PREFILL: 1}.get(graph, 2)
    if graph in (CONDITION, STEP, PREFILL):  # of as many blocks
        assert report.layers == {
            kind: {dtype if name == "half" else name: count for name, count in counts.items()}
            for kind, counts in LAYERS[graph].items()
        }
    else:
        wide = sum(counts.get("float32", 0) for counts in report.layers.values())
        kinds = {dtype for counts in report.layers.values() for dtype in counts}
        assert (wide, kinds) == {DECODE: (0, {dtype}), ENCODE: (2, {dtype, "float32"})}[graph]


@pytest.mark.parametrize("graph", GRAPHS)
def test_float32(tiny_bundle: Path, library: TrtLibrary, graph: str) -> None:
    """Attention in float32 is built from other layers: it has no kernel."""
    bundle = Bundle.open(tiny_bundle)
    report = build_engine(library, bundle, engine_id(library, bundle, graph)).precision
    assert report.share == 1 and report.fused_attention == 0
    assert {dtype for counts in report.layers.values() for dtype in counts} == {"float32"}


@pytest.mark.parametrize("target", ["8.6", "8.0,8.6,8.9,12.0,12.1"])
def test_targets(tiny_bundles: Callable[[str], Path], library: TrtLibrary, target: str) -> None:
    bundle = Bundle.open(tiny_bundles("fp16"))
    assert build_engine(library, bundle, engine_id(library, bundle, "step", target=target)).data.nbytes > 0
    assert set(target.split(",")) <= set(supported_targets(library))


def test_no_engine_for_turing(tiny_bundles: Callable[[str], Path], library: TrtLibrary) -> None:
    """Why that target is not offered."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    assert "7.5" not in supported_targets(library)
    with pytest.raises(BackendUnavailable, match=r"Turing \(SM75\): FP32 GEMM is not supported"):
        build_engine(library, bundle, engine_id(library, bundle, "step", target="7.5"))


def claimed(path: Path, precision: str) -> Bundle:
    """The bundle with a manifest that says another precision."""
    manifest = Bundle.open(path).manifest
    return seal(path, replace(manifest, precision=precision, graphs=graph_specs(manifest.model, precision)))


@pytest.mark.parametrize(
    ("graph", "got", "expected"),
    [
        (
            "condition",
            "condition: 0 of 3 matmul, convolution and attention layers in float16 (matmul ",
            "all in float16;",
        ),
        ("step", "step: 0 of 16 matmul, ", "all in float16 but the matmul at codes in float32;"),
        ("decode", "decode: 0 of ", "all in float16;"),
        ("encode", "encode: 0 of ", "the convolution at image and the convolution at latent in float32;"),
    ],
)
def test_a_float32_graph_passed_off_as_half(
    bundle_copy: Path, library: TrtLibrary, graph: str, got: str, expected: str
) -> None:
    bundle = claimed(bundle_copy, "fp16")
    with pytest.raises(ArtifactRefused) as refusal:
        build_engine(library, bundle, engine_id(library, bundle, graph))
    assert refusal.value.got.startswith(got) and " in float32" in refusal.value.got
    assert expected in str(refusal.value) and "export the bundle again with --precision fp16" in str(refusal.value)


def test_one_layer_in_float32(spoil: Spoil, library: TrtLibrary) -> None:
    """The wider layer is named."""

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
    with pytest.raises(ArtifactRefused, match=r"step: 14 of 16 matmul, .* in float16 \(matmul node_\S+ in float32\)"):
        build_engine(library, bundle, engine_id(library, bundle, "step"))


@pytest.mark.parametrize(
    ("graph", "matmuls", "fused"),
    [("step", {"float16": 7, "float32": 9}, 1), ("prefill", {"float16": 2, "float32": 9}, 0)],
)
def test_parts_kept_in_float32(
    graph_cache: GraphCache,
    tiny_pair: tuple[FlexVAR, Tokenizer],
    tiny_bundles: Callable[[str], Path],
    library: TrtLibrary,
    tmp_path: Path,
    graph: str,
    matmuls: dict[str, int],
    fused: int,
) -> None:
    """They build where the manifest names them: no more than it names, and in the step no less."""
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
        return build_engine(library, bundle, engine_id(library, bundle, graph)).precision

    report = build(kept)
    assert report.layers["matmul"] == matmuls and report.fused_attention == fused
    with pytest.raises(ArtifactRefused, match=rf"{graph}: \S+ of \S+ matmul.* float32, and blocks.0.attention;"):
        build(kept[:1])
    if graph == "step":
        with pytest.raises(ArtifactRefused, match=r"and blocks\.0\.attention, blocks\.0\.mlp, blocks\.1\.mlp"):
            build((*kept, "blocks.1.mlp"))


def test_attention_must_stay_fused() -> None:
    layers = [Layer(str(i), "attention", "float16", frozenset(), i != 1) for i in range(3)]
    with pytest.raises(ArtifactRefused, match="step: 2 fused of 3 attention layers, 3 in the graph; expected 3, all"):
        prove_precision("step", "fp16", layers, 3)
    with pytest.raises(ArtifactRefused, match="3 attention layers, 4 in the graph; expected 4; "):
        prove_precision("decode", "fp16", layers, 4)
    assert prove_precision("decode", "fp16", layers, 3).fused_attention == 2
    with pytest.raises(ArtifactRefused, match="decode: 0 of 0 matmul"):
        prove_precision("decode", "fp16", [], 0)


def test_an_island_elsewhere_is_none() -> None:
    """What may be float32 is that one layer, not any layer of its kind."""
    half = Layer("a", "matmul", "float16", frozenset(), False)
    island = Layer("b", "matmul", "float32", frozenset({"codes"}), False)
    prove_precision("step", "fp16", [half, island], 0)
    for wrong in (replace(island, border=frozenset({"t"})), replace(island, kind="convolution")):
        with pytest.raises(ArtifactRefused):
            prove_precision("step", "fp16", [half, island, wrong], 0)
    with pytest.raises(ArtifactRefused):  # nor may it be half
        prove_precision("step", "fp16", [half, replace(island, dtype="float16")], 0)


def test_a_length_that_the_parser_ignores(spoil: Spoil, library: TrtLibrary) -> None:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Attention")
        node.input.extend(["", "", "", "cond_rows"])

    bundle = spoil("step", edit, "fp16")
    with pytest.raises(ArtifactRefused, match=r"step.onnx: node \S+ \(Attention\) with nonpad_kv_seqlen; expected att"):
        build_engine(library, bundle, engine_id(library, bundle, "step"))


def test_the_parsers_refusal(spoil: Spoil, library: TrtLibrary) -> None:
    """Node, operator and the parser's own words."""

    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Conv")
        node.op_type, node.name = "Multinomial", "dice"
        del node.input[1:]
        node.ClearField("attribute")

    bundle = spoil("decode", edit, "fp16")
    with pytest.raises(BackendUnavailable) as refusal:
        build_engine(library, bundle, engine_id(library, bundle, "decode"))
    assert refusal.value.got.startswith("decode.onnx: node dice (Multinomial): ")
    assert refusal.value.expected == f"a graph that tensorrt-rtx {library.version} can parse"


def test_another_border(spoil: Spoil, library: TrtLibrary) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "picture"
        for node in model.graph.node:
            for i, name in enumerate(node.output):
                if name == "image":
                    node.output[i] = "picture"

    bundle = spoil("decode", edit, "fp16")
    with pytest.raises(ArtifactRefused, match=r"decode.onnx: \('picture', .*; expected \('image', 'float32', "):
        build_engine(library, bundle, engine_id(library, bundle, "decode"))


def test_weights_of_another_file(bundle_copy: Path, library: TrtLibrary) -> None:
    """They would stand outside the hash by which the engine is found."""
    path = bundle_copy / "step.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "tables.npz"
    path.write_bytes(model.SerializeToString())
    bundle = seal(bundle_copy, Manifest.from_bytes((bundle_copy / "manifest.json").read_bytes()))
    with pytest.raises(
        ArtifactRefused, match=r"step.onnx: weights in 'tables.npz'; expected weights in step.onnx.data"
    ):
        build_engine(library, bundle, engine_id(library, bundle, "step"))


def test_a_profile_the_graph_does_not_take(schema1_bundle: Path, library: TrtLibrary) -> None:
    """No image at all: its decoder reshapes by the number of images."""
    bundle = Bundle.open(schema1_bundle)
    wanted = engine_id(library, bundle, "decode")
    empty = dataclasses.replace(wanted.profiles[0], axes={"images": (0, 0, 0), "height": (2,) * 3, "width": (2,) * 3})
    with pytest.raises((InvalidInput, BackendUnavailable), match=r"decode"):
        build_engine(library, bundle, replace(wanted, profiles=(empty,)))


def test_interrupted(tiny_bundles: Callable[[str], Path], library: TrtLibrary) -> None:
    """Ctrl-C in the middle: the build ends within seconds and leaves no thread; the next one works."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    wanted = engine_id(library, bundle, "step", ALL, 8)
    before = threading.active_count()
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(library, bundle, wanted, tick=tick)
    assert len(ticks) < len(wanted.profiles) and threading.active_count() == before
    build_engine(library, bundle, engine_id(library, bundle, "condition"))


BUILDS = """
import pickle, sys
from pathlib import Path
from flexvar_export.engine_builder import build_engine
from flexvar_runtime.backends.trt_library import load

bundle, wanted = pickle.load(sys.stdin.buffer)
for _ in range(4):
    build_engine(load("tensorrt-rtx"), bundle, wanted)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))  # ru_maxrss is the starter's, if larger
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system keeps no record of the largest memory")
def test_memory_is_given_back(wide_bundles: Callable[[str, str], Bundle], library: TrtLibrary) -> None:
    """Builds one after another take no more than one, in a process that does nothing else."""
    bundle = wide_bundles("fp16", CONDITION)
    given = pickle.dumps((bundle, engine_id(library, bundle, "condition")))
    output = subprocess.run([sys.executable, "-c", BUILDS], input=given, stdout=subprocess.PIPE, check=True).stdout
    first, *_, last = (int(line) for line in output.split())
    assert last - first < 60e3  # kB; the engine is 38 MB, and four are built


# TensorRT for data centres, which is not there without a GPU


class FakeLogger:
    Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class FakeMonitor:
    pass


class FakeCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class FakeTensorRT:
    """Parses into no layers and builds as told, in the way of the bindings."""

    __version__ = "11.4.0.106"
    ILogger, IProgressMonitor = FakeLogger, FakeMonitor
    BuilderFlag = types.SimpleNamespace(TF32="TF32")
    ProfilingVerbosity = types.SimpleNamespace(DETAILED="DETAILED")

    def __init__(self, outcome: Callable[[Any], Any]) -> None:
        self.outcome = outcome
        self.calls: list[Any] = []
        self.cache: FakeCache | None = None
        self.progress_monitor: Any = None

    def Builder(self, logger: Any) -> FakeTensorRT:
        self.logger = logger
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("create_") or name == "OnnxParser":
            return lambda *_: self
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments)) or True

    def create_timing_cache(self, data: bytes) -> FakeCache | None:
        self.cache = None if data.startswith(b"broken") else FakeCache(data)
        return self.cache

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        return self.outcome(self)


@pytest.fixture
def fake_build(
    tiny_bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, FakeTensorRT]]:
    """(outcome, timing) -> the plan of `condition`, and the library that played TensorRT."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    half = [Layer("m", "matmul", "float16", frozenset(), False)]
    monkeypatch.setattr(engine_builder, "arithmetic", lambda *_: half)
    monkeypatch.setattr(engine_builder, "decompose_attention", lambda *_: 0)
    monkeypatch.setattr(engine_builder, "_check_border", lambda *_: None)

    def run(outcome: Callable[[Any], Any] = lambda _: b"plan", timing: Path | None = None) -> tuple[Any, FakeTensorRT]:
        fake = FakeTensorRT(outcome)
        library = TrtLibrary("tensorrt", fake, fake.__version__)
        wanted = engine_id(library, bundle, "condition", target="9.0")
        return build_engine(library, bundle, wanted, timing=timing).data, fake

    return run


def test_the_way_of_tensorrt(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    data, fake = fake_build()
    assert data == b"plan"
    assert ("clear_flag", "TF32") in fake.calls and fake.profiling_verbosity == "DETAILED"
    assert ("set_shape", "labels", (16,), (16,), (16,)) in fake.calls
    assert not [call for call in fake.calls if "capabilit" in call[0] or "timing" in call[0]]


def test_timings_are_kept(fake_build: Callable[..., tuple[Any, FakeTensorRT]], tmp_path: Path) -> None:
    path = tmp_path / "timing" / "11.4.0-9.0.cache"
    for expected in (b"+", b"++"):
        fake_build(timing=path)
        assert path.read_bytes() == expected and path.parent.stat().st_mode & 0o777 == 0o700
    path.write_bytes(b"broken")  # by another version, say
    fake_build(timing=path)
    assert path.read_bytes() == b"+"
    path.parent.chmod(0o777)
    with pytest.raises(ArtifactRefused, match="writable by others"):
        fake_build(timing=path)


def test_no_timings_with_rtx(tiny_bundles: Callable[[str], Path], library: TrtLibrary, tmp_path: Path) -> None:
    """Keeping them crashes it."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    build_engine(library, bundle, engine_id(library, bundle, "condition"), timing=tmp_path / "timing" / "x.cache")
    assert not list(tmp_path.iterdir())


def say(fake: FakeTensorRT, text: str) -> None:
    fake.logger.log(FakeLogger.Severity["ERROR"], text)


def test_tensorrt_refuses(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"condition.onnx: \[optimizer\] no implementation; expected a graph that"
    ):
        fake_build(lambda fake: say(fake, "[optimizer]\n no implementation"))


def no_memory(fake: FakeTensorRT) -> None:
    raise MemoryError("std::bad_alloc")


@pytest.mark.parametrize("outcome", [lambda fake: say(fake, "Cuda Runtime (out of memory)"), no_memory])
def test_no_memory(fake_build: Callable[..., tuple[Any, FakeTensorRT]], outcome: Callable[[Any], None]) -> None:
    with pytest.raises(
        OutOfMemory, match=r"condition.onnx: .*name fewer --schedule, or a smaller --max-batch"
    ) as error:
        fake_build(outcome)
    assert error.value.exit_code == 6


def test_an_exception_of_the_library(fake_build: Callable[..., tuple[Any, FakeTensorRT]]) -> None:
    with pytest.raises(ZeroDivisionError):
        fake_build(lambda fake: 1 / 0)


# The inspector's text of a finished engine


def row(kind: str, dtype: str, tactic: str = "") -> dict[str, Any]:
    tensor = {"Name": "x", "Location": "Device", "Dimensions": [2, 4, 1024], "Format/Datatype": dtype}
    return {"Name": f"{kind}_myl0_3", "LayerType": kind, "Inputs": [tensor], "Outputs": [tensor], "TacticName": tactic}


def test_inspected_precision() -> None:
    rows = [
        row("gemm", "Half", "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize64x64x64"),
        row("gemm", "Float", "sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize64x64x8"),
        row("kgen", "Half", "_gemm_mha_v2_0x5a3c"),
        row("kgen", "Float", "__myl_CastMeanSubMulMeanAddSqrtDivMul_0xf2543c36ff9f104b"),
        row("CaskConvolution", "Channel major FP16 format where channel % 8 == 0", "sm80_xmma_fprop_implicit_gemm"),
        row("CaskConvolution", "Row major linear FP32"),
        row("MatrixMultiply", "BFloat16"),
        row("Reformat", "Half"),
        row("signal", ""),
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
def test_nothing_to_inspect(text: str) -> None:
    """Layer names alone, as without detailed verbosity, tell of no types."""
    with pytest.raises(ArtifactRefused):
        inspect_precision(text, "float16")
