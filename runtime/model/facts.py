"""The sizes of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import require, require_range


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of the transformer and the tokenizer. Raises ArtifactRefused.

    class_names: in label order. null_class: the label that means "no class". downsampling: pixels per side of a token.
    value_range: the decoder's output for black and for white. position_side: side of the learned position table, in
    tokens.
    """

    depth: int
    width: int
    heads: int
    head_size: int
    classes: int
    class_names: tuple[str, ...] | None
    null_class: int
    vocabulary: int
    code_dim: int
    downsampling: int
    value_range: tuple[float, float]
    position_side: int

    def __post_init__(self) -> None:
        require_range("depth", self.depth, 1, 256)
        require_range("heads", self.heads, 1, 1024)
        require_range("head_size", self.head_size, 1, 1024)
        require(self.width == self.heads * self.head_size, "width", self.width, "heads times head_size")
        require_range("classes", self.classes, 1, 2**20)
        names = self.class_names
        named = names is None or len(names) == self.classes
        require(named, "class_names", names, f"one name for each of {self.classes} classes")
        require_range("null_class", self.null_class, 0, self.classes)
        require_range("vocabulary", self.vocabulary, 1, 2**20)
        require_range("code_dim", self.code_dim, 1, 2**14)
        power_of_two = 1 <= self.downsampling <= 64 and self.downsampling & (self.downsampling - 1) == 0
        require(power_of_two, "downsampling", self.downsampling, "a power of two up to 64")
        low, high = self.value_range
        require(-1e4 <= low < high <= 1e4, "value_range", self.value_range, "low < high, both from -10000 to 10000")
        require_range("position_side", self.position_side, 1, 1024)

    @classmethod
    def published(cls, depth: int) -> ModelFacts:
        """The published model of a depth: 16, 20 or 24 blocks."""
        return cls(
            depth=depth,
            width=64 * depth,
            heads=depth,
            head_size=64,
            classes=1000,
            class_names=None,
            null_class=1000,
            vocabulary=8912,
            code_dim=32,
            downsampling=16,
            value_range=(-1.0, 1.0),
            position_side=32,
        )
