"""Sizes of the two networks. The published models are presets."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InvalidInput


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise InvalidInput(
                f"{name} is {value!r}, but it must be a whole number of at least 1.",
                expected="a whole number of at least 1",
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
        _check_sizes(
            self, "depth", "heads", "head_size", "mlp_ratio", "classes", "vocabulary", "code_dim", "position_side"
        )
        for name in ("label_dropout", "drop_path"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise InvalidInput(
                    f"{name} is {value!r}, but it must be a probability: at least 0 and below 1.",
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
        _check_sizes(
            self, "channels", "encoder_blocks", "decoder_blocks", "latent_channels", "vocabulary", "code_dim", "groups"
        )
        if not self.multipliers or any(c < 1 or c % self.groups for c in self.level_channels):
            raise InvalidInput(
                f"The levels have {self.level_channels} channels, but there must be at least one level, and the "
                f"channels of each level must be a multiple of groups ({self.groups}).",
                expected="levels of at least one channel, each divisible by the groups",
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
