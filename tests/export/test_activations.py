"""The largest activation: found in its place, recorded for every graph, and the reason to refuse float16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexvar_ref
from flexvar_export.activations import LargestActivation, largest_activations, refuse_overflow
from flexvar_export.bundle import export_bundle
from flexvar_export.proof import Proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.bundle.manifest import Range
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import GRAPHS, REQUIRED

Pair = tuple[FlexVAR, Tokenizer]
LIMIT = 8188.0  # 65504 / 8


@pytest.fixture
def pair(tiny_pair: Pair) -> Pair:
    """A copy of the tiny model that a test may change."""
    return copy.deepcopy(tiny_pair)


# Which results are inspected


class Sequence(nn.Module):
    """Operations in sequence."""

    def __init__(self, *operations: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operations = operations

    def forward(self, x: Tensor) -> Tensor:
        for operation in self.operations:
            x = operation(x)
        return x


def watched(*operations: Callable[[Tensor], Tensor], x: Tensor) -> Range:
    module = Sequence(*operations)
    watch = LargestActivation(module)
    with torch.inference_mode(), watch:
        module(x)
    return watch.release()


def test_the_largest_magnitude_of_any_half_precision_result() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    found = watched(lambda x: x * -100, lambda x: x / 1000, x=x)
    assert (found.value, found.where) == (200.0, "graph (aten.mul.Tensor)")


def test_float32_results_do_not_count() -> None:
    x = torch.tensor([3.0], dtype=torch.bfloat16)
    assert watched(lambda x: x.float() * 1e6, lambda x: (x * 1e-6).bfloat16(), x=x).value == 3.0


@pytest.mark.parametrize("less", [1, 0])
def test_nan_and_infinity_are_the_largest(less: int) -> None:
    """NaN (0 / 0) and infinity (1 / 0)."""
    x = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    found = watched(lambda x: (x - less) / (x - 1), lambda x: x[1:] * 5, x=x)
    assert (found.value, found.where) == (1e38, "graph (aten.div.Tensor)")


def test_attention_scores_count() -> None:
    """torch does not return them, but the graph holds them in half precision."""
    q = torch.full((1, 1, 2, 64), 100.0, dtype=torch.bfloat16)
    attend = nn.functional.scaled_dot_product_attention
    rounding = 2.0**-8
    assert watched(lambda x: attend(x, x, x * 0), x=q).value == pytest.approx(100 * 100 * 64 / 8, rel=rounding)
    assert watched(lambda x: attend(x, x, x * 0, scale=1.0), x=q).value == pytest.approx(100 * 100 * 64, rel=rounding)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: F.conv2d(x, torch.full((4, 4, 3, 3), 0.37, dtype=x.dtype), padding=1),
        lambda x: x @ torch.full((8, 8), 0.37, dtype=x.dtype),
        lambda x: F.linear(x, torch.full((8, 8), 0.37, dtype=x.dtype), torch.full((8,), 0.11, dtype=x.dtype)),
    ],
)
def test_products_are_summed_in_float32_and_rounded_once(product: Callable[[Tensor], Tensor]) -> None:
    """The bits are those of the float32 result, rounded. Float32 operands are unchanged."""
    x = torch.randn(2, 4, 8, 8).bfloat16()
    module = Sequence(product)
    watch = LargestActivation(module)
    with torch.inference_mode(), watch:
        got, wide = module(x), module(x.float())
    expected = _of_rounded_constants(product, x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
    assert wide.dtype == torch.float32
    assert watch.release().value == pytest.approx(expected.float().abs().max().item())


def _of_rounded_constants(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The product in float32 with constants rounded to bfloat16, then rounded."""
    full = torch.full

    def rounded(*arguments: Any, **options: Any) -> Tensor:
        return full(*arguments, **{**options, "dtype": torch.bfloat16}).float()

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "full", rounded)
        return product(x.float()).bfloat16()


def test_release_removes_all_hooks() -> None:
    module = Sequence(lambda x: x)
    LargestActivation(module).release()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


# In the graphs


def test_planted_activations_are_found(pair: Pair, tiny_proof: Proof) -> None:
    model, tokenizer = pair
    with torch.no_grad():
        model.get_parameter("blocks.1.ffn.fc1.bias")[3] = 30000
        tokenizer.get_parameter("decoder.mid.0.conv2.bias")[0] = 10000
        tokenizer.get_parameter("encoder.mid.2.conv2.bias")[0] = -20000
    found = largest_activations(model, tokenizer, tiny_proof)
    planted = {
        "step": (30000, "blocks.1"),
        "decode": (10000, "decoder"),
        "encode": (20000, "encoder.mid.2"),
    }
    for graph, (value, where) in planted.items():
        assert found[graph].value == pytest.approx(value, rel=0.01)  # a bias, and what it was added to
        assert where in found[graph].where


def test_the_products_of_the_condition_count_but_not_its_float32_biases(pair: Pair, tiny_proof: Proof) -> None:
    """A bias is added in float32 and cannot overflow. A product of 9000 can."""
    model = pair[0]
    h_MC = F.silu(model.class_emb.weight.detach())
    with torch.no_grad():
        model.get_parameter("blocks.1.ada_lin.1.bias")[5] = -50000
        assert largest_activations(*pair, tiny_proof)["condition"].value < 100
        model.get_parameter("blocks.1.ada_lin.1.bias")[5] = 0
        row = model.get_parameter("blocks.1.ada_lin.1.weight")[5]
        row.zero_()
        row[0] = 9000 / (h_MC - h_MC.mean(0))[:, 0].abs().max()
    found = largest_activations(*pair, tiny_proof)["condition"]
    assert found.value == pytest.approx(9000, rel=0.01)
    assert "blocks.1" in found.where


def test_scores_of_the_decoders_attention_are_found(pair: Pair, tiny_proof: Proof) -> None:
    with torch.no_grad():
        for layer in "qk":
            pair[1].get_parameter(f"decoder.mid.1.{layer}.weight").zero_()
            pair[1].get_parameter(f"decoder.mid.1.{layer}.bias").fill_(300)
    found = largest_activations(*pair, tiny_proof)["decode"]
    channels = pair[1].config.level_channels[-1]
    assert found.value == pytest.approx(300 * 300 * channels**0.5, rel=0.01)  # 64 of them, divided by √64
    with pytest.raises(ArtifactRefused, match="decode"):
        refuse_overflow({"decode": found})


def test_bundles_of_all_precisions_record_the_same_activations(
    tiny_bundles: Callable[[str], Path], tiny_pair: Pair, tiny_proof: Proof
) -> None:
    records = [Bundle.open(tiny_bundles(precision)).manifest.largest_activation for precision in Precision]
    assert records[0].keys() == set(REQUIRED)  # prefill computes what step does
    for record in (*records[1:], largest_activations(*tiny_pair, tiny_proof)):
        for graph, found in record.items():
            assert found.value == pytest.approx(records[0][graph].value, rel=2**-6)  # sums of other threads, rounded
            assert 1 < found.value < 100 and found.where  # of weights made for activations near 1


# The limit of float16


def test_the_limit_is_an_eighth_of_the_largest_float16_number() -> None:
    fine = {graph: Range(value=LIMIT, where="x") for graph in GRAPHS}
    refuse_overflow(fine)
    with pytest.raises(ArtifactRefused) as refused:
        refuse_overflow({**fine, "decode": Range(value=LIMIT + 0.5, where="decoder.mid.0 (aten.add.Tensor)")})
    named = ("8188.5", "decode", "decoder.mid.0 (aten.add.Tensor)", "8188", "--precision bf16")
    assert all(text in str(refused.value) for text in named)
    with pytest.raises(ArtifactRefused, match=r"step .*1e\+38"):
        refuse_overflow({"step": Range(value=1e38, where="NaN")})


@pytest.fixture
def loud_checkpoint(pair: Pair, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model with the values of one attention 2¹³ times larger and its projection as much smaller: the same
    function, exactly, with activations beyond 8188."""
    model, tokenizer = pair
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.mat_qkv.weight")[2 * model.config.width :] *= 2.0**13
        model.get_parameter("blocks.0.attn.v_bias").mul_(2.0**13)
        model.get_parameter("blocks.0.attn.proj.weight").mul_(2.0**-13)
    paths = tmp_path / "loud.safetensors", tmp_path / "vae.safetensors"
    flexvar_ref.save(model, paths[0])
    flexvar_ref.save(tokenizer, paths[1])
    return paths


def test_a_model_too_large_for_fp16_exports_to_bf16(
    loud_checkpoint: tuple[Path, Path],
    cached_exports: None,
    tiny_bundles: Callable[[str], Path],
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    transformer, vae = loud_checkpoint
    out = tmp_path / "loud.bundle"
    code, _, err = run_cli("export", transformer, "--vae", vae, "-o", out, "--precision", "fp16")
    assert code == 5
    assert "blocks.0" in err and "--precision bf16" in err
    assert not out.exists() and not list(tmp_path.glob(".*"))

    loud = export_bundle(transformer, vae, out, precision="bf16").manifest
    assert loud.largest_activation["step"].value > LIMIT
    quiet = Bundle.open(tiny_bundles("bf16")).manifest
    assert loud.largest_activation["step"].value > 50 * quiet.largest_activation["step"].value
    # powers of two change no rounding: the very same errors, but for the threads of the reference
    errors = [row.value for row in quiet.parity.rows]
    assert [row.value for row in loud.parity.rows] == pytest.approx(errors, rel=1e-2)
