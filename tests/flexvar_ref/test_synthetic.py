"""Synthetic weights are those of the recordings, on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from flexvar_ref import TokenizerConfig, TransformerConfig, load
from flexvar_ref.errors import InvalidInput
from flexvar_ref.synthetic import (
    TINY_TOKENIZER,
    synthetic_state,
    tiny_transformer,
    tokenizer_state,
    transformer_state,
    write_checkpoints,
)

# Digests from the script that made the weights of tests/golden.
D2_WEIGHTS = "67bd137b1df085fc90ee7bc5d042ed1c70339a4a354d44dbcc6a28a867efe77c"
D2_NAMES = "13feadbfd326fa715ce7d1381b49be099bed4c8fd2b19cae526df7e13e626cb9"
TOKENIZER_NAMES = "0e7d5bf12497803b29179906c0bbad0e6c74f05159c85c189b596e813bdf0b0a"


def names_digest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return hashlib.sha256("".join(f"{k} {shapes[k]}\n" for k in sorted(shapes)).encode()).hexdigest()


def digest(state: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        array = state[name].numpy()
        sha.update(f"{name} {array.shape} {array.dtype}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def d2() -> dict[str, torch.Tensor]:
    return transformer_state(TransformerConfig.published(2), seed=0)


def test_published_names_and_shapes(d2: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_digest({k: tuple(v.shape) for k, v in d2.items()}) == D2_NAMES
    monkeypatch.setattr("flexvar_ref.synthetic.synthetic_state", lambda shapes, seed: shapes)  # skips 72 M draws
    assert names_digest(tokenizer_state(TokenizerConfig())) == TOKENIZER_NAMES


def test_weights_of_the_recordings(d2: dict[str, torch.Tensor]) -> None:
    few = {
        "pos_start": [0.45994887, -0.35575306, -0.31201687],
        "blocks.1.attn.scale_mul_1H11": [1.332052, 1.4730529],
        "head.weight": [1.1737581, 0.3210919, 0.11559402],
    }
    for name, values in few.items():
        np.testing.assert_allclose(d2[name].flatten()[: len(values)], values, rtol=1e-6)
    assert not d2["blocks.0.attn.zero_k_bias"].any()
    assert digest(d2) == D2_WEIGHTS


def test_weights_of_the_second_recording() -> None:
    shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.norm_out.weight": (512,)}
    state = synthetic_state({**shapes, "quantize.embedding.weight": (8912, 32)}, seed=1)
    few = {
        "encoder.conv_in.weight": [-0.02415416, -0.25540772, 0.11750897],
        "encoder.norm_out.weight": [1.086227, 0.96503645, 1.1125082],
        "quantize.embedding.weight": [-0.16452843, -0.19039102, -0.21514407],
    }
    for name, values in few.items():
        np.testing.assert_allclose(state[name].flatten()[:3], values, rtol=1e-6)


def test_weights_depend_on_the_seed_only() -> None:
    config = tiny_transformer(1)
    assert digest(transformer_state(config, 3)) == digest(transformer_state(config, 3))
    assert digest(transformer_state(config, 3)) != digest(transformer_state(config, 4))


@pytest.mark.parametrize(
    ("transformer", "tokenizer", "fault"),
    [
        (TransformerConfig(depth=1, heads=2, vocabulary=512, code_dim=8), TINY_TOKENIZER, "2 heads"),
        (tiny_transformer(), TokenizerConfig(groups=16), "16 groups"),
    ],
)
def test_sizes_without_a_published_layout_are_refused(
    tmp_path: Path, transformer: TransformerConfig, tokenizer: TokenizerConfig, fault: str
) -> None:
    with pytest.raises(InvalidInput, match=fault):
        write_checkpoints(tmp_path, transformer, tokenizer)
    assert not list(tmp_path.iterdir())


def test_written_checkpoints_load_with_their_sizes(tmp_path: Path) -> None:
    transformer = TransformerConfig(
        depth=3, heads=2, head_size=16, mlp_ratio=3, classes=5, vocabulary=40, code_dim=6, position_side=7
    )
    tokenizer = TokenizerConfig(
        channels=32,
        multipliers=(1, 3),
        encoder_blocks=2,
        decoder_blocks=1,
        latent_channels=9,
        vocabulary=40,
        code_dim=6,
    )
    model, vae = load(*write_checkpoints(tmp_path / "new", transformer, tokenizer))
    assert vae.config == tokenizer
    assert {**vars(model.config), "drop_path": 0.0} == vars(transformer)
    assert not model.training and not vae.training
