"""Synthetic checkpoints: deterministic weights in the published `.pth` layouts, at any size, without a download.

Each parameter is drawn from a generator seeded with (seed, crc32 of its published name). The weights are scaled so that
activations stay near unit size and logits are as peaked as those of a trained model. Tests and benchmarks use them:
they need a model of a given size, not good images.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import TokenizerConfig, TransformerConfig
from .errors import InvalidInput
from .parameters import published_name
from .sizes import PUBLISHED_GROUPS
from .tokenizer import Tokenizer
from .transformer import FlexVAR

TINY_TOKENIZER = TokenizerConfig(
    channels=32,
    multipliers=(1, 2, 2),
    encoder_blocks=1,
    decoder_blocks=1,
    latent_channels=16,
    vocabulary=512,
    code_dim=8,
)
"""A small tokenizer for tests: 3 levels (downsampling 4), fewer channels and codes, another code dimension."""


def tiny_transformer(
    depth: int = 2, classes: int = 10, tokenizer: TokenizerConfig = TINY_TOKENIZER
) -> TransformerConfig:
    """Sizes of a transformer with `depth` blocks and as many heads, for a small tokenizer."""
    return TransformerConfig(
        depth=depth, heads=depth, classes=classes, vocabulary=tokenizer.vocabulary, code_dim=tokenizer.code_dim
    )


def synthetic_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Float32 weights for the published names and shapes in `shapes`."""
    return {name: torch.from_numpy(_weight(name, shape, seed)) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith(("zero_k_bias", "codebook_used")):
        return np.zeros(shape, np.float32)
    if name.endswith("scale_mul_1H11"):
        return np.float32(np.log(4.0)) + np.float32(0.1) * noise
    if len(shape) == 1 and name.endswith(".weight"):  # gains of normalisations
        return np.float32(1) + np.float32(0.1) * noise
    if len(shape) == 1:
        return np.float32(0.05) * noise
    if name.startswith(("pos_", "class_emb")):
        return np.float32(0.5) * noise
    if name == "head.weight":
        return noise * np.float32(4.0 / np.sqrt(shape[1]))
    return noise / np.float32(np.sqrt(np.prod(shape[1:])))


def transformer_state(config: TransformerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Synthetic weights of a transformer under their published names."""
    with torch.device("meta"):
        model = FlexVAR(config, torch.empty(config.vocabulary, config.code_dim))
    return synthetic_state({name: tuple(value.shape) for name, value in model.state_dict().items()}, seed)


def tokenizer_state(config: TokenizerConfig, seed: int = 0) -> dict[str, Tensor]:
    """Synthetic weights of a tokenizer under their published names."""
    with torch.device("meta"):
        model = Tokenizer(config)
    shapes = {published_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    return synthetic_state({**shapes, "quantize.codebook_used": (65536,)}, seed)


def write_checkpoints(
    directory: str | Path, transformer: TransformerConfig, tokenizer: TokenizerConfig, seed: int = 0
) -> tuple[Path, Path]:
    """Write `transformer.pth` and `vae.pth` in the published layouts and return their paths.

    Raises InvalidInput for sizes that cannot be read back from a published layout.
    """
    if tokenizer.groups != PUBLISHED_GROUPS or transformer.depth < transformer.heads:
        raise InvalidInput(
            f"The models have {tokenizer.groups} groups, {transformer.depth} blocks and {transformer.heads} heads, but "
            f"the published layouts need {PUBLISHED_GROUPS} groups and at least as many blocks as heads.",
            expected=f"{PUBLISHED_GROUPS} groups and no fewer blocks than heads",
            fix="Save them as safetensors with flexvar_ref.save.",
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "transformer.pth", directory / "vae.pth"
    torch.save({"trainer": {"var_wo_ddp": transformer_state(transformer, seed)}}, paths[0])
    torch.save({"model": tokenizer_state(tokenizer, seed)}, paths[1])
    return paths
