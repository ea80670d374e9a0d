"""The target of an export: the form of its decoder, and CUDA kernels for every node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from flexvar_export.bundle import export_bundle
from flexvar_export.targets import choose_decoder, choose_target, require_cuda_kernels
from flexvar_runtime import ArtifactRefused, Bundle, InvalidInput
from flexvar_runtime.model.precision import Precision


@pytest.mark.parametrize(
    ("precision", "target", "chosen", "decoder"),
    [
        ("fp16", "auto", "gpu", "plain"),
        ("fp16", "cpu", "cpu", "phases"),
        ("fp32", "auto", "cpu", "phases"),
        ("fp32", "gpu", "gpu", "plain"),
        ("bf16", "auto", "cpu", "phases"),
        ("bf16", "gpu", "gpu", "plain"),
        ("int8", "auto", "cpu", "phases"),
        ("int8-bf16", "auto", "cpu", "transposed"),
    ],
)
def test_the_decoder_follows_the_target(precision: str, target: str, chosen: str, decoder: str) -> None:
    assert choose_target(target, Precision(precision)) == chosen
    assert choose_decoder("auto", Precision(precision), chosen) == decoder
    assert choose_decoder("phases", Precision(precision), chosen) == "phases"


def test_options_that_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"--target .*'tpu'"):
        choose_target("tpu", Precision.FP32)
    with pytest.raises(InvalidInput, match=r"--target gpu .*--precision int8"):
        choose_target("gpu", Precision.INT8)
    with pytest.raises(InvalidInput, match=r"--decoder .*'cubic'"):
        choose_decoder("cubic", Precision.FP32, "cpu")


def test_the_command(
    tiny_checkpoint: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    transformer, vae = tiny_checkpoint
    out = tmp_path / "bundle"
    code, _, err = run_cli(
        "export", transformer, "--vae", vae, "-o", out, "--target", "gpu", "--precision", "int8-bf16"
    )
    assert code == 2 and "--target gpu" in err and "--precision int8-bf16" in err and not out.exists()


@pytest.mark.slow
def test_bfloat16_for_a_gpu(tiny_checkpoint: tuple[Path, Path], tmp_path: Path, quick_export: None) -> None:
    """The decoder has no resize, for which the CUDA provider has no bfloat16 kernel. The gates hold."""
    bundle = export_bundle(*tiny_checkpoint, tmp_path / "bundle", precision="bf16", target="gpu", threads=1)
    assert bundle.manifest.decoder == "plain" and bundle.manifest.parity.passed
    nodes = onnx.load(str(bundle.graph_file("decode")), load_external_data=False).graph.node
    assert not {"Resize", "ConvTranspose", "Pad"} & {node.op_type for node in nodes}


def test_a_decoder_without_a_kernel_is_refused(tiny_checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Before anything is exported."""
    with pytest.raises(InvalidInput, match=r"--decoder transposed .*--precision bf16"):
        export_bundle(*tiny_checkpoint, tmp_path / "bundle", precision="bf16", target="gpu", decoder="transposed")
    assert not (tmp_path / "bundle").exists()


def test_a_planted_operator_is_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    graphs = Bundle.open(tiny_bundle).manifest.graphs
    require_cuda_kernels(folder, graphs)
    model = onnx.load(str(folder / "step.onnx"), load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type, node.name = "Mish", "planted"
    onnx.save(model, str(folder / "step.onnx"))
    with pytest.raises(ArtifactRefused, match=r"1 Mish .*step.* planted") as refusal:
        require_cuda_kernels(folder, graphs)
    assert "--target cpu" in refusal.value.fix
