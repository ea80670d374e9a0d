"""The forms of the decoder's upsampling equal the reference, in torch and as graphs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from flexvar_export.bundle import export_bundle
from flexvar_export.modules import graph_module
from flexvar_export.parity import relative_error
from flexvar_export.upsampling import (
    PhaseUpsample,
    TransposedUpsample,
    phase_kernels,
    replace_upsampling,
    transposed_kernel,
)
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig
from flexvar_ref.tokenizer import Upsample
from flexvar_runtime import Bundle, FlexVARPipeline, InvalidInput

Pair = tuple[FlexVAR, Tokenizer]
SIZES = [(1, 1), (1, 4), (3, 5), (8, 8)]
FORMS = {"phases": PhaseUpsample, "transposed": TransposedUpsample}
CONFIGS = [((8, 16, 8), 2), ((4, 4, 12, 8), 4), ((24, 24), 8)]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def random_tokenizer(channels: tuple[int, ...], groups: int) -> Tokenizer:
    torch.manual_seed(len(channels))
    config = TokenizerConfig(
        channels=1, multipliers=channels, groups=groups, encoder_blocks=1, decoder_blocks=1, latent_channels=8
    )
    return Tokenizer(config).eval()


def rewritten(tokenizer: Tokenizer, form: str, dtype: torch.dtype) -> Tokenizer:
    other = copy.deepcopy(tokenizer)
    replace_upsampling(other.decoder, form, dtype)
    return other.to(dtype)


# In torch


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("channels", "groups"), CONFIGS)
@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_exact(form: str, channels: tuple[int, ...], groups: int, dtype: torch.dtype, noise: float) -> None:
    """Sums are in another order, so float noise remains."""
    plain = random_tokenizer(channels, groups).to(torch.float64)
    other = rewritten(plain, form, dtype)
    assert sum(isinstance(part, FORMS[form]) for part in other.modules()) == len(channels) - 1
    assert not any(isinstance(part, Upsample) for part in other.modules())
    for h, w in SIZES:
        codes = torch.randn(2, h, w, plain.config.code_dim, dtype=dtype)
        expected = plain.decode_codes(codes.double())
        assert error(other.decode_codes(codes), expected) < noise


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_every_pixel_of_one_upsampling_is_exact(form: str) -> None:
    """At the border too."""
    torch.manual_seed(0)
    plain = Upsample(6).double()
    for size in SIZES:
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        assert torch.allclose(FORMS[form](plain, torch.float64)(x), plain(x), rtol=0, atol=1e-14)


def test_kernels_by_hand() -> None:
    """The taps are 1 to 9 of one channel. In even rows the first tap reads the pixel above."""
    kernels = phase_kernels(torch.arange(1.0, 10).view(1, 1, 3, 3))[:, :, 0, 0]
    assert kernels.dtype == torch.float64
    assert kernels[0, 0].tolist() == [[1, 2 + 3], [4 + 7, 5 + 6 + 8 + 9]]
    assert kernels[0, 1].tolist() == [[1 + 2, 3], [4 + 5 + 7 + 8, 6 + 9]]
    assert kernels[1, 0].tolist() == [[1 + 4, 2 + 3 + 5 + 6], [7, 8 + 9]]
    assert kernels[1, 1].tolist() == [[1 + 2 + 4 + 5, 3 + 6], [7 + 8, 9]]


def test_transposed_kernel_by_hand() -> None:
    """The same sixteen sums. The axis of input channels is first."""
    kernel = transposed_kernel(torch.arange(1.0, 10).view(1, 1, 3, 3))
    assert kernel.dtype == torch.float64
    assert kernel[0, 0].tolist() == [
        [9, 8 + 9, 7 + 8, 7],
        [6 + 9, 5 + 6 + 8 + 9, 4 + 5 + 7 + 8, 4 + 7],
        [3 + 6, 2 + 3 + 5 + 6, 1 + 2 + 4 + 5, 1 + 4],
        [3, 2 + 3, 1 + 2, 1],
    ]
    assert transposed_kernel(torch.zeros(5, 2, 3, 3)).shape == (2, 5, 4, 4)


@torch.inference_mode()
def test_swapped_phases_are_wrong() -> None:
    """A negative control of the tests above."""
    torch.manual_seed(0)
    plain, x = Upsample(6), torch.randn(2, 6, 3, 5)
    for names in itertools.combinations(("00", "01", "10", "11"), 2):
        phases = PhaseUpsample(plain, torch.float32)
        assert error(phases(x), plain(x)) < 1e-5
        first, second = (phases.get_buffer(f"weight_{name}") for name in names)
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        assert error(phases(x), plain(x)) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_summed_before_they_are_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Upsample(8)
    exact = phase_kernels(plain.conv.weight)
    phases = PhaseUpsample(plain, dtype)
    half_a_digit = torch.finfo(dtype).eps / 2
    for a, b in itertools.product(range(2), repeat=2):
        weight = phases.get_buffer(f"weight_{a}{b}")
        assert weight.dtype == dtype and weight.is_contiguous()
        assert ((weight.double() - exact[a, b]).abs() <= half_a_digit * exact[a, b].abs() + 1e-7).all()
    twice = phase_kernels(plain.conv.weight.to(dtype))  # the wrong order: taps rounded, then their sums
    assert not torch.equal(twice.to(dtype)[1, 1], phases.get_buffer("weight_11"))
    assert torch.equal(TransposedUpsample(plain, dtype).weight, transposed_kernel(plain.conv.weight).to(dtype))


def test_the_reference_is_not_changed(tiny_pair: Pair) -> None:
    before = {name: value.clone() for name, value in tiny_pair[1].state_dict().items()}
    for form in FORMS:
        graph_module("decode", *tiny_pair, torch.float16, decoder=form)
    after = tiny_pair[1].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


# As a graph


@pytest.mark.parametrize(
    ("precision", "form", "worst"),
    [("fp32", "phases", 100), ("fp16", "plain", 50), ("bf16", "phases", 40), ("int8-bf16", "transposed", 40)],
)
def test_every_precision_holds_its_gate(
    tiny_bundles: Callable[[str], Path], precision: str, form: str, worst: float
) -> None:
    """worst: PSNR in dB."""
    manifest = Bundle.open(tiny_bundles(precision)).manifest
    rows = [row for row in manifest.parity.rows if row.graph == "decode"]
    assert manifest.decoder == form and manifest.parity.passed
    assert len(rows) == 2 and all(row.value > worst for row in rows)


def test_a_bundle_decodes_as_the_reference(tiny_bundle: Path, tiny_pair: Pair) -> None:
    rng = np.random.default_rng(0)
    with FlexVARPipeline.from_bundle(tiny_bundle, backend="ort-cpu", threads=1) as pipeline:
        for size in ((1, 1), (3, 5), (6, 9)):
            tokens = rng.integers(0, tiny_pair[1].config.vocabulary, (2, *size), dtype=np.int32)
            with torch.inference_mode():
                expected = tiny_pair[1].decode(torch.from_numpy(tokens)).numpy()
            got = np.concatenate([part.copy() for part in pipeline.generator.decode(tokens)])
            assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize(
    ("precision", "form", "doubled", "small", "transposed"),
    [("fp16", "plain", 1, 0, 0), ("fp32", "phases", 0, 4, 0), ("int8-bf16", "transposed", 0, 0, 1)],
)
def test_the_manifest_names_the_form_of_the_decoder(
    tiny_bundles: Callable[[str], Path],
    tiny_pair: Pair,
    run_cli: Callable[..., tuple[int, str, str]],
    precision: str,
    form: str,
    doubled: int,
    small: int,
    transposed: int,
) -> None:
    """The numbers are operators per upsampling: resizes, 2×2 convolutions, transposed convolutions."""
    bundle = Bundle.open(tiny_bundles(precision))
    assert bundle.manifest.decoder == form
    upsamplings = len(tiny_pair[1].config.level_channels) - 1
    nodes = onnx.load(str(bundle.graph_file("decode")), load_external_data=False).graph.node
    kernels = [list(a.ints) for node in nodes for a in node.attribute if a.name == "kernel_shape"]
    operators = [node.op_type for node in nodes]
    assert operators.count("Resize") == doubled * upsamplings
    assert kernels.count([2, 2]) == small * upsamplings
    assert operators.count("ConvTranspose") == transposed * upsamplings
    code, text, _ = run_cli("inspect", bundle.path)
    assert code == 0 and f"decoder {form}" in " ".join(text.replace("│", "").split())


def test_unknown_decoders_are_refused(
    tiny_checkpoint: tuple[Path, Path], tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(InvalidInput, match=r"--decoder .*'fast'.*auto, plain, phases, transposed"):
        export_bundle(*tiny_checkpoint, tmp_path / "bundle", decoder="fast")
    transformer, vae = tiny_checkpoint
    code, _, err = run_cli("export", transformer, "--vae", vae, "-o", tmp_path / "bundle", "--decoder", "Phases")
    assert code == 2 and "--decoder" in err and "'Phases'" in err
    assert not list(tmp_path.iterdir())
