"""Codebook, positions and quantisation equal those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexvar_ref
from flexvar_runtime import ArtifactRefused
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.tables import Tables

Pair = tuple[flexvar_ref.FlexVAR, flexvar_ref.Tokenizer]
SIZES = [(1, 1), (3, 5), (8, 8), (13, 13), (12, 20), (32, 32), (33, 40), (64, 23)]
ROUNDING = 1e-6  # float32 means of values below 3


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture(scope="module")
def tables(reference: Pair) -> Tables:
    model, tokenizer = reference
    arrays = (tokenizer.codebook_VD, model.pos_1LC[0], model.word_embed.bias)
    return Tables(*(array.detach().numpy() for array in arrays))


def test_positions(tables: Tables, reference: Pair) -> None:
    for h, w in SIZES:
        got = tables.positions(h, w)
        assert got.shape == (h * w, 128) and got.dtype == np.float32
        np.testing.assert_allclose(got, reference[0].positions(h, w).detach().numpy(), rtol=0, atol=ROUNDING)
        np.testing.assert_array_equal(tables.offset(h, w), got + tables.input_bias)


def test_a_shift_of_the_positions_is_seen(tables: Tables, reference: Pair) -> None:
    """Negative control."""
    shifted = Tables(tables.codebook, np.roll(tables.position_table, 1, axis=-1), tables.input_bias)
    expected = reference[0].positions(8, 8).detach().numpy()
    assert np.abs(shifted.positions(8, 8) - expected).max() > 0.1


@pytest.mark.parametrize(
    ("size", "wanted"), [((1, 1), (2, 2)), ((3, 5), (12, 20)), ((13, 13), (16, 16)), ((23, 23), (32, 32))]
)
def test_next_codes(tables: Tables, reference: Pair, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    tokens = np.random.default_rng(0).integers(0, 512, (3, *size)).astype(np.int32)
    expected = reference[0].next_codes(torch.from_numpy(tokens), size, wanted).numpy()
    got = tables.next_codes(tokens, wanted)
    assert got.dtype == np.float32
    # codes of norm 1; torch finds the position of a tap in float32, 3e-6 of a weight at side 32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    for i in range(3):
        np.testing.assert_array_equal(tables.next_codes(tokens[i : i + 1], wanted)[0], got[i])


@pytest.mark.parametrize("latent_size", [(8, 8), (12, 20), (5, 3)])
def test_quantize(tables: Tables, reference: Pair, latent_size: tuple[int, int]) -> None:
    latent = np.random.default_rng(1).standard_normal((4, 8, *latent_size)).astype(np.float32)
    sizes = [(1, 1), (3, 5), (8, 8), (16, 16)]
    with torch.inference_mode():
        expected = reference[1].quantize(torch.from_numpy(latent), sizes)
    for size, tokens in zip(sizes, expected, strict=True):
        got = tables.quantize(latent, size)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, tokens.numpy())
        for i in range(4):
            np.testing.assert_array_equal(tables.quantize(latent[i : i + 1], size)[0], got[i])


def test_quantize_resizes_before_it_normalises(tables: Tables) -> None:
    """A long vector beside a short one: the mean has the direction of the long one."""
    latent = np.stack([100 * tables.codebook[7], tables.codebook[9]], axis=-1).reshape(1, 8, 1, 2)
    np.testing.assert_array_equal(tables.quantize(latent, (1, 1)), [[[7]]])
    np.testing.assert_array_equal(tables.quantize(latent, (1, 2)), [[[7, 9]]])


def test_quantize_takes_a_latent_of_zeros(tables: Tables) -> None:
    assert tables.quantize(np.zeros((1, 8, 2, 2), np.float32), (2, 2)).shape == (1, 2, 2)


def test_every_code_is_its_own_nearest(tables: Tables) -> None:
    codes = np.ascontiguousarray(tables.codebook.T).reshape(1, 8, 16, 32)
    np.testing.assert_array_equal(tables.quantize(codes, (16, 32)), np.arange(512).reshape(1, 16, 32))


# Reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(manifest: Manifest) -> ModelFacts:
    return manifest.model


def arrays_of(model: ModelFacts) -> dict[str, Any]:
    shapes = {
        "codebook": (model.vocabulary, model.code_dim),
        "position_table": (model.width, model.position_side, model.position_side),
        "input_bias": (model.width,),
    }
    return {name: np.random.default_rng(2).random(shape, np.float32) for name, shape in shapes.items()}


def test_save_and_load(model: ModelFacts, tmp_path: Path) -> None:
    arrays = arrays_of(model)
    Tables(**arrays).save(tmp_path / "tables.npz")
    loaded = Tables.load(tmp_path / "tables.npz", model)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(loaded, name), array)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda arrays: arrays.pop("codebook"), "codebook"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "extra"),
        (lambda arrays: arrays.update(codebook=arrays["codebook"][:5]), "(5, 8)"),
        (lambda arrays: arrays.update(codebook=arrays["codebook"].astype("f8")), "float64"),
        (lambda arrays: arrays.update(codebook=np.array([{}])), "plain numbers"),
    ],
)
def test_tables_of_another_model(model: ModelFacts, tmp_path: Path, change: Callable[[Any], Any], named: str) -> None:
    arrays = arrays_of(model)
    change(arrays)
    np.savez(tmp_path / "tables.npz", **arrays)
    with pytest.raises(ArtifactRefused, match=r"^tables\.npz") as refusal:
        Tables.load(tmp_path / "tables.npz", model)
    assert named in refusal.value.got


def test_a_file_that_is_not_npz(model: ModelFacts, tmp_path: Path) -> None:
    for content in (b"", b"no zip", b"PK\x03\x04 cut off", b"\x80\x04N."):
        (tmp_path / "tables.npz").write_bytes(content)
        with pytest.raises(ArtifactRefused, match=r"^tables\.npz"):
            Tables.load(tmp_path / "tables.npz", model)
