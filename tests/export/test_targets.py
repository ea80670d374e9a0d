"""What a bundle is exported for: the form of its decoder, and CUDA kernels for every node."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from flexvar_export.bundle import export_bundle
from flexvar_export.targets import choose_decoder, choose_target, require_cuda_kernels
from flexvar_runtime import ArtifactRefused, Bundle, InvalidInput


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
    assert choose_target(target, precision) == chosen
    assert choose_decoder("auto", precision, chosen) == decoder
    assert choose_decoder("phases", precision, chosen) == "phases", "what is named is taken"


@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [("tpu", "fp32", "got --target 'tpu'"), ("gpu", "int8", "--target gpu with --precision int8")],
)
def test_targets_that_are_refused(target: str, precision: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        choose_target(target, precision)


def test_the_command(
    tiny_checkpoint: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    transformer, vae = tiny_checkpoint
    out = tmp_path / "bundle"
    code, _, err = run_cli(
        "export", transformer, "--vae", vae, "-o", out, "--target", "gpu", "--precision", "int8-bf16"
    )
    assert code == 2 and "--target gpu with --precision int8-bf16" in err and not out.exists()


def test_bfloat16_for_a_gpu(tiny_checkpoint: tuple[Path, Path], tmp_path: Path, cached_exports: None) -> None:
    """Doubled without a resize, which the CUDA provider does not have in bfloat16. The gates hold."""
    bundle = export_bundle(*tiny_checkpoint, tmp_path / "bundle", precision="bf16", target="gpu", threads=1)
    assert bundle.manifest.decoder == "plain" and bundle.manifest.parity.passed
    nodes = onnx.load(str(bundle.graph_file("decode")), load_external_data=False).graph.node
    assert not {"Resize", "ConvTranspose", "Pad"} & {node.op_type for node in nodes}


def test_a_decoder_without_a_kernel_is_refused(tiny_checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    """Before anything is exported."""
    with pytest.raises(InvalidInput, match="--decoder transposed with --precision bf16 for a GPU"):
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
    with pytest.raises(ArtifactRefused, match=r"graph step: .* 1 Mish; the first is planted") as refusal:
        require_cuda_kernels(folder, graphs)
    assert "--target cpu" in refusal.value.fix
