"""The export of a checkpoint: the content of the bundle, and that no unproved bundle is left under its name."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import flexvar_ref
from flexvar_export import bundle as exporter
from flexvar_export.bundle import export_bundle
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts
from flexvar_export.modules import graph_module
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import (
    ArtifactRefused,
    BackendUnavailable,
    Bundle,
    FlexVARError,
    FlexVARPipeline,
    InvalidInput,
    ParityFailed,
)
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import graph_specs
from flexvar_runtime.model.tables import Tables

Checkpoint = tuple[Path, Path]
NAMES = ("goldfish", "crème brûlée", "volcano", "d", "e", "f", "g", "h", "i", "j")


def listing(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The content of a bundle


@pytest.mark.parametrize("precision", Precision)
def test_contents(tiny_bundles: Callable[[str], Path], precision: str) -> None:
    path = tiny_bundles(precision)
    large = {"fp32": ["decode", "encode", "step"], "int8": ["decode", "encode"]}  # over 1 MiB
    beside = [f"{graph}.onnx.data" for graph in large.get(precision, [])]
    graphs = ["condition.onnx", "decode.onnx", "encode.onnx", "prefill.onnx", "step.onnx"]
    assert listing(path) == sorted([*graphs, *beside, "manifest.json", "proof.npz", "tables.npz"])
    assert not list(path.parent.glob(f".{path.name}*"))  # and nothing beside it


@pytest.mark.parametrize("precision", Precision)
def test_manifest(
    tiny_bundles: Callable[[str], Path],
    tiny_checkpoint: Checkpoint,
    tiny_pair: tuple[FlexVAR, Tokenizer],
    precision: str,
) -> None:
    manifest = Bundle.open(tiny_bundles(precision)).manifest
    facts = manifest.model
    assert (facts.depth, facts.width, facts.heads, facts.head_size) == (2, 128, 2, 64)
    assert (facts.classes, facts.null_class, facts.class_names) == (10, 10, None)
    assert (facts.vocabulary, facts.code_dim, facts.downsampling, facts.position_side) == (512, 8, 4, 32)
    assert facts.value_range == (-1.0, 1.0)
    assert facts == model_facts(*tiny_pair)
    assert (manifest.precision, manifest.graphs) == (precision, graph_specs(facts, precision))

    provenance = manifest.provenance
    assert provenance.transformer_sha256 == sha256(tiny_checkpoint[0])
    assert provenance.tokenizer_sha256 == sha256(tiny_checkpoint[1])
    assert provenance.tools["torch"] == torch.__version__ and provenance.tools["onnx"] == onnx.__version__
    assert {"python", "flexvar-deploy", "onnxscript", "onnxruntime", "numpy"} <= provenance.tools.keys()
    assert not any("/" in value for value in provenance.tools.values())


def test_defaults_are_those_of_the_published_evaluation(tiny_bundle: Path) -> None:
    defaults = Bundle.open(tiny_bundle).manifest.defaults
    assert defaults == PUBLISHED_DEFAULTS
    assert (defaults.schedule, defaults.max_side) == ("1_2_3_4_5_6_8_10_13_16", 16)
    assert (defaults.guidance_scale, defaults.guidance_rule) == (2.5, "ramp")
    assert (defaults.top_k, defaults.top_p, defaults.greedy_scales) == (900, 0.95, "upstream")


def test_tables_equal_the_reference(tiny_bundle: Path, tiny_pair: tuple[FlexVAR, Tokenizer]) -> None:
    model, tokenizer = tiny_pair
    bundle = Bundle.open(tiny_bundle)
    tables = Tables.load(bundle.file("tables.npz"), bundle.manifest.model)
    with torch.inference_mode():
        assert np.array_equal(tables.codebook, tokenizer.codebook_VD)
        assert np.array_equal(tables.input_bias, model.word_embed.bias)
        for size in ((1, 1), (5, 3), (16, 16), (40, 33)):
            # float32 sums of up to 32² entries in another order
            assert np.allclose(tables.positions(*size), model.positions(*size), atol=1e-6)


def test_class_names_are_in_the_manifest(quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(*tiny_checkpoint, tmp_path / "out", class_names=NAMES)
    assert bundle.manifest.model.class_names == NAMES
    assert Bundle.open(tmp_path / "out").manifest == bundle.manifest


def test_progress_names_every_step(quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from flexvar_export.commands import EXPORT_STEPS

    said: list[str] = []
    export_bundle(*tiny_checkpoint, tmp_path / "out", progress=said.append)
    assert said == [
        "loading the checkpoint",
        "running the reference",
        "measuring activations",
        "exporting condition",
        "exporting step",
        "exporting prefill",
        "exporting decode",
        "exporting encode",
        "proving parity",
    ]
    assert len(said) == EXPORT_STEPS


# Checkpoints


def test_safetensors_give_the_same_bundle(
    cached_exports: None,
    tiny_pair: tuple[FlexVAR, Tokenizer],
    tiny_bundle: Path,
    tmp_path: Path,
    same_files: Callable[[Bundle, Bundle], None],
) -> None:
    """Only the provenance differs from the bundle of the published layout."""
    paths = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    flexvar_ref.save(tiny_pair[0], paths[0])
    flexvar_ref.save(tiny_pair[1], paths[1])
    made = export_bundle(*paths, tmp_path / "out")
    same_files(made, Bundle.open(tiny_bundle))
    provenance = made.manifest.provenance
    assert (provenance.transformer_sha256, provenance.tokenizer_sha256) == (sha256(paths[0]), sha256(paths[1]))


class Runs:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def transformer_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(torch.load(checkpoint[0], weights_only=True)["trainer"]["var_wo_ddp"])


def spoil_checkpoint(kind: str, checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    transformer, vae = (directory / path.name for path in checkpoint)
    for source, target in zip(checkpoint, (transformer, vae), strict=True):
        shutil.copy(source, target)
    if kind == "a block is missing":
        state = transformer_state(checkpoint)
        torch.save({k: v for k, v in state.items() if not k.startswith("blocks.0.")}, transformer)
    elif kind == "it runs code":
        torch.save(Runs(directory / "ran"), transformer)
    elif kind == "the files are swapped":
        return vae, transformer
    elif kind == "it is cut":
        transformer.write_bytes(transformer.read_bytes()[:100_000])
    elif kind == "it is not there":
        transformer.unlink()
    elif kind == "it holds NaN":
        state = transformer_state(checkpoint)
        state["head.weight"][0, 0] = torch.nan
        torch.save(state, transformer)
    elif kind == "of another tokenizer":
        state = transformer_state(checkpoint)
        state["head.weight"], state["head.bias"] = state["head.weight"][:100], state["head.bias"][:100]
        torch.save(state, transformer)
    elif kind == "the tokenizer is cut":
        vae.write_bytes(vae.read_bytes()[:-1000])
    return transformer, vae


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("a block is missing", r"blocks\.0\.ada_lin\.1\.bias"),
        ("it runs code", r"transformer\.pth.*(posix|nt)\.system"),
        ("the files are swapped", r"holds a (transformer|tokenizer)"),
        ("it is cut", r"transformer\.pth"),
        ("it is not there", r"transformer\.pth"),
        ("it holds NaN", r"head\.weight"),
        ("of another tokenizer", "100 .*512"),
        ("the tokenizer is cut", r"vae\.pth"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path, kind: str, named: str) -> None:
    with pytest.raises(ArtifactRefused, match=named) as refused:
        export_bundle(*spoil_checkpoint(kind, tiny_checkpoint, tmp_path), tmp_path / "out")
    assert refused.value.exit_code == 5
    assert all((refused.value.got, refused.value.expected, refused.value.fix))
    assert not {"out", "ran"} & set(listing(tmp_path)) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (NAMES[:9], "9 class names.* 10 classes"),
        (("a\nb", *NAMES[1:]), r"'a\\nb'"),
        (("\ud800", *NAMES[1:]), r"'\\ud800'"),
    ],
)
def test_class_names_are_checked_before_the_export(
    tiny_checkpoint: Checkpoint, tmp_path: Path, names: tuple[str, ...], named: str
) -> None:
    steps: list[str] = []
    with pytest.raises(InvalidInput, match=named):
        export_bundle(*tiny_checkpoint, tmp_path / "out", class_names=names, progress=steps.append)
    assert steps == ["loading the checkpoint"] and listing(tmp_path) == []


def test_options_are_refused_before_anything_is_read(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    steps: list[str] = []
    for options in ({"precision": "fp8"}, {"precision": "FP16"}, {"threads": 0}, {"threads": -1}):
        with pytest.raises(InvalidInput):
            export_bundle(*tiny_checkpoint, tmp_path / "out", progress=steps.append, **options)
    assert steps == [] and listing(tmp_path) == []


def test_without_onnx_runtime_the_export_fails_at_once(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    steps: list[str] = []
    with pytest.raises(BackendUnavailable, match="ort-cpu"):
        export_bundle(*tiny_checkpoint, tmp_path / "out", progress=steps.append)
    assert steps == [] and listing(tmp_path) == []


# No unproved bundle is left

STEPS = (
    "load_reference",
    "make_proof",
    "largest_activations",
    "graph_module",
    "export_graph",
    "tables",
    "seal",
    "prove",
)


@pytest.mark.parametrize(
    ("step", "error"),
    [*((step, KeyboardInterrupt) for step in STEPS), ("export_graph", OSError), ("prove", MemoryError)],
)
def test_an_exception_at_any_step_leaves_nothing(
    quick_export: None,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: type[BaseException],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("planted")

    monkeypatch.setattr(exporter, step, fail)
    with pytest.raises(error, match="planted"):
        export_bundle(*tiny_checkpoint, tmp_path / "out")
    assert listing(tmp_path) == []


def wrong_module(right: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """A `graph_module` that returns a condition whose modulation is a thousandth too large."""

    def build(graph: str, *arguments: Any) -> torch.nn.Module:
        module = right(graph, *arguments)
        if graph == "condition":
            with torch.no_grad():
                for dense in module.children():
                    for value in dense.buffers():
                        value *= 1.001
        return module

    return build


def test_a_bundle_that_fails_its_proof_is_removed(
    quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "graph_module", wrong_module(graph_module))
    with pytest.raises(ParityFailed, match=r"condition, output modulation: .* 0\.001 on ort-cpu") as failed:
        export_bundle(*tiny_checkpoint, tmp_path / "out")
    assert failed.value.exit_code == 3
    assert listing(tmp_path) == []


def test_force_replaces_a_bundle_only_by_a_proved_one(
    quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_bundle(*tiny_checkpoint, out)
    before = sha256(out / "manifest.json")

    steps: list[str] = []
    with pytest.raises(InvalidInput, match="--force"):
        export_bundle(*tiny_checkpoint, out, class_names=NAMES, progress=steps.append)
    assert steps == [] and sha256(out / "manifest.json") == before

    with monkeypatch.context() as patch:
        patch.setattr(exporter, "graph_module", wrong_module(graph_module))
        with pytest.raises(ParityFailed):
            export_bundle(*tiny_checkpoint, out, class_names=NAMES, force=True)
    assert sha256(out / "manifest.json") == before and listing(tmp_path)[0] == "out"

    bundle = export_bundle(*tiny_checkpoint, out, class_names=NAMES, force=True)
    assert bundle.manifest.model.class_names == NAMES
    assert sha256(out / "manifest.json") != before
    assert not list(tmp_path.glob(".*"))


def test_force_replaces_nothing_but_a_bundle(quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    with pytest.raises(FlexVARError, match=r"photos .*--force"):
        export_bundle(*tiny_checkpoint, out, force=True)
    assert listing(tmp_path) == ["photos", "photos/manifest.json"]


HANG = """
import sys, time
from flexvar_export import bundle

def export_graph(module, spec, directory, weights_of=None):
    (directory / spec.file).write_bytes(b"half a graph")
    print("exporting", flush=True)
    time.sleep(600)

bundle.export_graph = export_graph
bundle.make_proof = lambda *_: bundle.make_proof
bundle.make_proof.thinned = lambda: bundle.make_proof
bundle.make_proof.save = lambda path: path.write_bytes(b"proof")
bundle.largest_activations = lambda *_: {}
bundle.export_bundle(*sys.argv[1:])
"""


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(
    quick_export: None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", HANG, *map(str, tiny_checkpoint), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "exporting\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not out.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-") and "condition.onnx" in listing(left)
    with pytest.raises(ArtifactRefused):
        Bundle.open(left)  # under its hidden name it is no bundle either

    export_bundle(*tiny_checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_generates(tiny_bundles: Callable[[str], Path]) -> None:
    for precision in ("fp32", "fp16"):
        with FlexVARPipeline.from_bundle(tiny_bundles(precision), "ort-cpu") as pipeline:
            result = pipeline([1], schedule="1_2_3", seed=1)
            assert result.images.shape == (1, 12, 12, 3) and result.images.std() > 1
