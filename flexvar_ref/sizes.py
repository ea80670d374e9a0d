"""Sizes of a model, inferred from the shapes of its published parameters or checked against them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from .config import TokenizerConfig, TransformerConfig

PUBLISHED_GROUPS = 32


class HasShape(Protocol):
    """A tensor, or the description of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Shapes = Mapping[str, HasShape]


def transformer_config(state: Shapes) -> TransformerConfig:
    """Sizes of a transformer, inferred from a published state. Published transformers have as many blocks as heads.

    Any block gives the sizes, so that a missing block can be reported by name later. Raises KeyError, ValueError or
    IndexError if the sizes cannot be inferred.
    """
    heads = _first_match(state, r"blocks\.\d+\.attn\.scale_mul_1H11").shape[1]
    width = state["word_embed.weight"].shape[0]
    depth = max(heads, _count_indices(state, r"blocks\.(\d+)\."))
    _require_parameters(depth, "blocks", state)
    return TransformerConfig(
        depth=depth,
        heads=heads,
        head_size=width // heads,
        mlp_ratio=_first_match(state, r"blocks\.\d+\.ffn\.fc1\.weight").shape[0] // width,
        classes=state["class_emb.weight"].shape[0] - 1,
        vocabulary=state["head.weight"].shape[0],
        code_dim=state["word_embed.weight"].shape[1],
        position_side=state["pos_1LC"].shape[-1],
        drop_path=0.1 * depth / 24,
    )


def tokenizer_config(state: Shapes) -> TokenizerConfig:
    """Sizes of a tokenizer, inferred from a published state. The number of groups is 32, as published.

    Raises KeyError, ValueError or IndexError if the sizes cannot be inferred.
    """
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = _count_indices(state, r"(?:en|de)coder\.conv_blocks\.(\d+)\.")
    _require_parameters(levels, "levels", state)
    # encoder and decoder mirror each other, so the channels of a level can be read from either
    mirrored = (rf"encoder\.conv_blocks\.{i}|decoder\.conv_blocks\.{levels - 1 - i}" for i in range(levels))
    outputs = [_first_match(state, rf"(?:{level})\.res\.\d+\.conv1\.weight").shape[0] for level in mirrored]
    return TokenizerConfig(
        channels=channels,
        multipliers=tuple(out // channels for out in outputs),
        encoder_blocks=_count_indices(state, r"encoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        decoder_blocks=_count_indices(state, r"decoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        latent_channels=state["quant_conv.weight"].shape[1],
        vocabulary=state["quantize.embedding.weight"].shape[0],
        code_dim=state["quantize.embedding.weight"].shape[1],
        groups=PUBLISHED_GROUPS,
    )


def require_parameters(config: TransformerConfig | TokenizerConfig, state: Shapes) -> None:
    """Raise ValueError if a model of these sizes would have more blocks than `state` has parameters."""
    if isinstance(config, TransformerConfig):
        _require_parameters(config.depth, "blocks", state)
    else:
        blocks = (config.encoder_blocks + config.decoder_blocks) * len(config.multipliers)
        _require_parameters(blocks, "residual blocks", state)


def _require_parameters(count: int, what: str, state: Shapes) -> None:
    if count > len(state):
        raise ValueError(f"it would have {count} {what} but only {len(state)} parameters.")


def _first_match(state: Shapes, pattern: str) -> HasShape:
    for name, value in state.items():
        if re.fullmatch(pattern, name):
            return value
    raise KeyError(pattern.replace("\\d+", "N").replace("\\", ""))


def _count_indices(state: Shapes, pattern: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)
