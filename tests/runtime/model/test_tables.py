"""The host's share of the model equals the reference's."""

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


@pytest.mark.parametrize("size", SIZES)
def test_positions(tables: Tables, reference: Pair, size: tuple[int, int]) -> None:
    expected = reference[0].positions(*size).detach().numpy()
    got = tables.positions(*size)
    assert got.shape == (size[0] * size[1], 128) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(tables.offset(*size), got + tables.input_bias)


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
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (16, 16)])
def test_quantize(tables: Tables, reference: Pair, latent_size: tuple[int, int], size: tuple[int, int]) -> None:
    latent = np.random.default_rng(1).standard_normal((4, 8, *latent_size)).astype(np.float32)
    with torch.inference_mode():
        [expected] = reference[1].quantize(torch.from_numpy(latent), [size])
    got = tables.quantize(latent, size)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected.numpy())
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
    ("change", "text"),
    [
        (lambda arrays: arrays.pop("codebook"), "expected float32 arrays {'codebook': (64, 8)"),
        (lambda arrays: arrays.update(extra=np.zeros(1)), "'extra': ('float64', (1,))"),
        (lambda arrays: arrays.update(codebook=arrays["codebook"][:5]), "'codebook': ('float32', (5, 8))"),
        (lambda arrays: arrays.update(codebook=arrays["codebook"].astype("f8")), "'codebook': ('float64', (64, 8))"),
        (lambda arrays: arrays.update(codebook=np.array([{}])), "Object arrays cannot be loaded"),
    ],
)
def test_tables_of_another_model(model: ModelFacts, tmp_path: Path, change: Callable[[Any], Any], text: str) -> None:
    arrays = arrays_of(model)
    change(arrays)
    np.savez(tmp_path / "tables.npz", **arrays)
    with pytest.raises(ArtifactRefused) as refusal:
        Tables.load(tmp_path / "tables.npz", model)
    assert text in str(refusal.value) and "tables.npz" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off", b"\x80\x04N."])
def test_what_is_no_npz(model: ModelFacts, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tables.npz").write_bytes(content)
    with pytest.raises(ArtifactRefused, match=r"got tables\.npz .*; expected arrays in npz form; fix: export again"):
        Tables.load(tmp_path / "tables.npz", model)
