"""Sizes of the two networks. The published models are presets."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidInput
from .parsing import shown_value

MAX_LEVELS, MAX_CHANNELS = 7, 2**14
_TRANSFORMER_LIMITS = {  # those of a bundle, see ModelFacts
    "depth": 256,
    "heads": 1024,
    "head_size": 1024,
    "mlp_ratio": 64,
    "classes": 2**20,
    "vocabulary": 2**20,
    "code_dim": 2**14,
    "position_side": 1024,
}
_TOKENIZER_LIMITS = {
    "channels": MAX_CHANNELS,
    "encoder_blocks": 64,
    "decoder_blocks": 64,
    "latent_channels": MAX_CHANNELS,
    "vocabulary": 2**20,
    "code_dim": 2**14,
    "groups": MAX_CHANNELS,
}


def _check_sizes(config: object, limits: dict[str, int]) -> None:
    """Raise InvalidInput unless every size is a whole number from 1 to its limit."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise InvalidInput(
                f"{name} is {shown_value(value)}, but it must be a whole number from 1 to {limit}.",
                expected=f"a whole number from 1 to {limit}",
                fix="Correct the configuration.",
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the scale-by-scale transformer.

    depth: number of blocks.
    heads: attention heads of each block.
    head_size: channels of each head. The width C is heads · head_size.
    mlp_ratio: width of the hidden MLP layer, divided by C.
    classes: number of classes. The label `classes` means "no class".
    vocabulary: number of codes, V.
    code_dim: dimension of a code, D.
    position_side: side of the learned position table.
    label_dropout: probability that a label becomes "no class", in training mode only.
    drop_path: probability that the last block drops a branch, in training mode only. It grows linearly with the block.

    Raises InvalidInput.
    """

    depth: int
    heads: int
    head_size: int = 64
    mlp_ratio: int = 4
    classes: int = 1000
    vocabulary: int = 8912
    code_dim: int = 32
    position_side: int = 32
    label_dropout: float = 0.1
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        _check_sizes(self, _TRANSFORMER_LIMITS)
        for name in ("label_dropout", "drop_path"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:  # NaN compares false
                raise InvalidInput(
                    f"{name} is {shown_value(value)}, but it must be a probability: at least 0 and below 1.",
                    expected="a probability below 1",
                    fix="Correct the configuration.",
                )

    @property
    def width(self) -> int:
        """Width C of the transformer."""
        return self.heads * self.head_size

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.classes

    @classmethod
    def published(cls, depth: int) -> TransformerConfig:
        """Sizes of FlexVAR-d16, d20 and d24: as many heads as blocks, width 64 · depth."""
        return cls(depth=depth, heads=depth, drop_path=0.1 * depth / 24)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of the VQ tokenizer.

    channels: channels of the first convolution.
    multipliers: channels of each level divided by `channels`, finest level first. The image side halves between levels.
    encoder_blocks: residual blocks of each encoder level.
    decoder_blocks: residual blocks of each decoder level.
    latent_channels: channels between the encoder or decoder and the 1×1 convolutions around the quantizer.
    vocabulary: number of codes, V.
    code_dim: dimension of a code, D.
    groups: groups of every group normalisation.

    Raises InvalidInput.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    latent_channels: int = 256
    vocabulary: int = 8912
    code_dim: int = 32
    groups: int = 32

    def __post_init__(self) -> None:
        _check_sizes(self, _TOKENIZER_LIMITS)
        factors = self.multipliers
        whole = isinstance(factors, tuple) and all(type(m) is int and 1 <= m <= MAX_CHANNELS for m in factors)
        if not whole or not 1 <= len(factors) <= MAX_LEVELS:
            expected = f"1 to {MAX_LEVELS} whole numbers from 1 to {MAX_CHANNELS}"
            raise InvalidInput(
                f"multipliers is {shown_value(factors)}, but it must be {expected}.",
                expected=expected,
                fix="Correct the configuration.",
            )
        if any(c % self.groups for c in self.level_channels):
            raise InvalidInput(
                f"The levels have {self.level_channels} channels, but the channels of each level must be a "
                f"multiple of groups ({self.groups}).",
                expected="levels of channels that are divisible by the groups",
                fix="Change channels, multipliers or groups.",
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Side of a token in pixels."""
        return 2 ** (len(self.multipliers) - 1)
