"""Sizes of the two networks. The published models are presets; every other size is just another value."""

from __future__ import annotations

from dataclasses import dataclass


def _check_sizes(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"got {name} {value!r}; expected a whole number of at least 1; fix: correct the configuration"
            )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the scale-by-scale transformer.

    depth: blocks; heads: attention heads; head_size: channels a head (width C = heads · head_size);
    mlp_ratio: hidden width over C; classes: number of labels (label `classes` means "no class");
    vocabulary: codes V; code_dim: dimension of a code; position_side: side of the learned position table.
    label_dropout and drop_path act in training mode only.
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
                raise ValueError(
                    f"got {name} {value!r}; expected a probability below 1; fix: correct the configuration"
                )

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.classes

    @classmethod
    def published(cls, depth: int) -> TransformerConfig:
        """FlexVAR-d16, d20, d24: width 64 · depth, as many heads as blocks."""
        return cls(depth=depth, heads=depth, drop_path=0.1 * depth / 24)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of the VQ tokenizer.

    channels: channels of the finest level; multipliers: channels of level i over `channels`, finest first (the
    image side shrinks by 2 between levels); encoder_blocks, decoder_blocks: residual blocks a level;
    latent_channels: channels between encoder or decoder and the 1×1 convolutions around the quantiser;
    vocabulary, code_dim: codebook (V, D); groups: of every group normalisation.
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
            raise ValueError(
                f"got channels {self.level_channels} in {self.groups} groups; expected levels of at least one channel, "
                "each divisible by the groups; fix: choose other `channels`, `multipliers` or `groups`"
            )

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    @property
    def downsampling(self) -> int:
        """Pixels a token side."""
        return 2 ** (len(self.multipliers) - 1)
