"""Engines of every graph, built by TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from graph_cache import GraphCache

from flexvar_export.bundle import TORCH_PRECISIONS, UNPROVEN
from flexvar_export.bundle_writer import seal
from flexvar_export.engine_builder import build_engine, supported_targets
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts
from flexvar_export.modules import graph_module
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_runtime import ArtifactRefused, BackendUnavailable, Bundle, InvalidInput, ScaleSchedule
from flexvar_runtime.backends.tensorrt.engine_files import EngineId
from flexvar_runtime.backends.tensorrt.library import TrtLibrary
from flexvar_runtime.bundle.manifest import Manifest, Provenance
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

EngineIds = Callable[..., EngineId]
Spoil = Callable[..., Bundle]
SMALL = [ScaleSchedule.parse("1_2x3")]
TEN_STEPS = [ScaleSchedule.parse(PUBLISHED["10"])]
ALL = [ScaleSchedule.parse(text) for text in PUBLISHED.values()]
MB_A_PROFILE = 20

# At the width of d16: two blocks, and a tokenizer whose attention is as wide as that of the published one


@pytest.fixture(scope="module")
def wide_bundles(graph_cache: GraphCache, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """(precision, graph) -> a bundle of one graph, of two blocks of d16. It is exported, but not proved."""
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
QUICK = [("fp16", CONDITION)]
LAYERS: dict[str, dict[str, dict[str, int]]] = {  # "half" is the precision of the bundle
    "condition": {"matmul": {"half": 3}},
    "step": {"matmul": {"half": 13, "float32": 1}, "attention": {"half": 2}},
    "prefill": {"matmul": {"half": 8, "float32": 1}, "attention": {"half": 1}},
    "decode": {"convolution": {"half": 21}, "attention": {"half": 2}},
    "encode": {"convolution": {"half": 19, "float32": 2}, "attention": {"half": 2}},
}

FULL_WIDTH = [  # test_half_precision builds the same layers of the others, smaller
    pytest.param(precision, dtype, graph, marks=() if (precision, graph) in QUICK else pytest.mark.slow)
    for precision, dtype in HALVES
    for graph in GRAPHS
]


@pytest.mark.parametrize(("precision", "dtype", "graph"), FULL_WIDTH)
def test_half_precision_at_full_width(
    wide_bundles: Callable[[str, str], Bundle],
    library: TrtLibrary,
    engine_id: EngineIds,
    graph: str,
    precision: str,
    dtype: str,
) -> None:
    """Every graph for the ten steps is built in its precision, with fused attention in the transformer."""
    bundle = wide_bundles(precision, graph)
    wanted = engine_id(bundle, graph, TEN_STEPS, 8)
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
    fused = {"step": 2, "prefill": 1}  # the last block of prefill has no attention; heads of 512 have no kernel
    assert report.fused_attention == fused.get(graph, 0)
    float32 = {"step": 1 / 16, "prefill": 1 / 10, "encode": 2 / 23}
    assert report.share == pytest.approx(1 - float32.get(graph, 0), abs=1e-4)


# The tiny model


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(("precision", "dtype"), HALVES)
def test_half_precision(
    tiny_bundles: Callable[[str], Path],
    library: TrtLibrary,
    engine_id: EngineIds,
    graph: str,
    precision: str,
    dtype: str,
) -> None:
    """Every graph is built in its precision. All attention is fused, because the tokenizer's is narrow enough here."""
    bundle = Bundle.open(tiny_bundles(precision))
    schedules = TEN_STEPS if (graph, precision) == (STEP, "fp16") else SMALL
    report = build_engine(library, bundle, engine_id(bundle, graph, schedules, 8)).precision
    assert report.claimed == dtype
    assert report.fused_attention == {CONDITION: 0, PREFILL: 1}.get(graph, 2)
    if graph in (CONDITION, STEP, PREFILL):  # they have as many blocks as at full width
        assert report.layers == {
            kind: {dtype if name == "half" else name: count for name, count in counts.items()}
            for kind, counts in LAYERS[graph].items()
        }
    else:
        wide = sum(counts.get("float32", 0) for counts in report.layers.values())
        kinds = {dtype for counts in report.layers.values() for dtype in counts}
        assert (wide, kinds) == {DECODE: (0, {dtype}), ENCODE: (2, {dtype, "float32"})}[graph]


@pytest.mark.parametrize("graph", GRAPHS)
def test_float32(tiny_bundle: Path, library: TrtLibrary, engine_id: EngineIds, graph: str) -> None:
    """Attention in float32 is built from other layers, because it has no fused kernel."""
    bundle = Bundle.open(tiny_bundle)
    report = build_engine(library, bundle, engine_id(bundle, graph)).precision
    assert report.share == 1 and report.fused_attention == 0
    assert {dtype for counts in report.layers.values() for dtype in counts} == {"float32"}


def test_all_targets_in_one_engine(
    tiny_bundles: Callable[[str], Path], library: TrtLibrary, engine_id: EngineIds
) -> None:
    bundle, target = Bundle.open(tiny_bundles("fp16")), "8.0,8.6,8.9,12.0,12.1"
    assert set(target.split(",")) <= set(supported_targets(library))
    assert build_engine(library, bundle, engine_id(bundle, "step", target=target)).data.nbytes > 0


def test_turing_is_no_supported_target(
    tiny_bundles: Callable[[str], Path], library: TrtLibrary, engine_id: EngineIds
) -> None:
    """The library lists it, but cannot build the step for it."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    assert "7.5" not in supported_targets(library)
    with pytest.raises(BackendUnavailable, match=r"Turing \(SM75\): FP32 GEMM is not supported"):
        build_engine(library, bundle, engine_id(bundle, "step", target="7.5"))


# Graphs that are refused


def test_an_input_that_the_parser_ignores(spoil: Spoil, library: TrtLibrary, engine_id: EngineIds) -> None:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Attention")
        node.input.extend(["", "", "", "cond_rows"])

    bundle = spoil("step", edit, "fp16")
    with pytest.raises(ArtifactRefused, match=r"step\.onnx: .* \(Attention\) .*nonpad_kv_seqlen"):
        build_engine(library, bundle, engine_id(bundle, "step"))


def test_a_graph_that_the_parser_refuses(spoil: Spoil, library: TrtLibrary, engine_id: EngineIds) -> None:
    """The error names the node and its operator."""

    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Conv")
        node.op_type, node.name = "NonZero", "sieve"
        del node.input[1:]
        node.ClearField("attribute")

    bundle = spoil("decode", edit, "fp16")
    with pytest.raises(BackendUnavailable, match=rf"tensorrt-rtx {library.version} .*decode\.onnx.* sieve \(NonZero\)"):
        build_engine(library, bundle, engine_id(bundle, "decode"))


def test_outputs_that_are_not_those_of_the_manifest(spoil: Spoil, library: TrtLibrary, engine_id: EngineIds) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.output[0].name = "picture"
        for node in model.graph.node:
            for i, name in enumerate(node.output):
                if name == "image":
                    node.output[i] = "picture"

    bundle = spoil("decode", edit, "fp16")
    with pytest.raises(ArtifactRefused, match=r"decode\.onnx .*'picture'.*image"):
        build_engine(library, bundle, engine_id(bundle, "decode"))


def test_weights_in_another_file(bundle_copy: Path, library: TrtLibrary, engine_id: EngineIds) -> None:
    """They would be outside the hash by which the engine is found."""
    path = bundle_copy / "step.onnx"
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "tables.npz"
    path.write_bytes(model.SerializeToString())
    bundle = seal(bundle_copy, Manifest.from_bytes((bundle_copy / "manifest.json").read_bytes()))
    with pytest.raises(ArtifactRefused, match=r"step\.onnx .*'tables\.npz'.*step\.onnx\.data"):
        build_engine(library, bundle, engine_id(bundle, "step"))


def test_a_profile_that_the_graph_does_not_take(
    schema1_bundle: Path, library: TrtLibrary, engine_id: EngineIds
) -> None:
    """A batch of no images: the decoder of this bundle reshapes by the number of images."""
    bundle = Bundle.open(schema1_bundle)
    wanted = engine_id(bundle, "decode")
    empty = replace(wanted.profiles[0], axes={"images": (0, 0, 0), "height": (2,) * 3, "width": (2,) * 3})
    with pytest.raises((InvalidInput, BackendUnavailable), match=r"decode"):
        build_engine(library, bundle, replace(wanted, profiles=(empty,)))


# Interrupts and memory


def test_an_interrupted_build_ends_and_the_next_one_works(
    tiny_bundles: Callable[[str], Path], library: TrtLibrary, engine_id: EngineIds
) -> None:
    """Ctrl-C in the middle of a build leaves no thread."""
    bundle = Bundle.open(tiny_bundles("fp16"))
    wanted = engine_id(bundle, "step", ALL, 8)
    before = threading.active_count()
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(library, bundle, wanted, tick=tick)
    assert len(ticks) < len(wanted.profiles) and threading.active_count() == before
    build_engine(library, bundle, engine_id(bundle, "condition"))


BUILDS = """
import pickle, sys
from pathlib import Path
from flexvar_export.engine_builder import build_engine
from flexvar_runtime.backends.tensorrt.library import load

bundle, wanted = pickle.load(sys.stdin.buffer)
for _ in range(4):
    build_engine(load("tensorrt-rtx"), bundle, wanted)
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))  # ru_maxrss may be that of the parent
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc/self/status")
def test_memory_of_a_build_is_freed(
    wide_bundles: Callable[[str, str], Bundle], library: TrtLibrary, engine_id: EngineIds
) -> None:
    """Several builds in one process need no more memory than one."""
    bundle = wide_bundles("fp16", CONDITION)
    given = pickle.dumps((bundle, engine_id(bundle, "condition")))
    output = subprocess.run([sys.executable, "-c", BUILDS], input=given, stdout=subprocess.PIPE, check=True).stdout
    first, *_, last = (int(line) for line in output.split())
    assert last - first < 60e3  # kB; the engine is 38 MB, and four are built
