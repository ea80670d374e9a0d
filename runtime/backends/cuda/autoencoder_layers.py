"""The layers of the decoder and the encoder, and the names of their parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...bundle.manifest import PHASES, TRANSPOSED
from ...model.signatures import DECODE


@dataclass(frozen=True)
class Residual:
    """Two normalised 3x3 convolutions, added to the input. shortcut: whether a convolution changes the channels."""

    name: str
    shortcut: bool


@dataclass(frozen=True)
class Attention:
    """Attention with one head over all positions, added to the input."""

    name: str


@dataclass(frozen=True)
class Upsample:
    """Doubles the sides. form: how the bundle stores its convolution (`upsampling` of the exporter)."""

    name: str
    form: str


@dataclass(frozen=True)
class Downsample:
    """Halves the sides by a 3x3 convolution."""

    name: str


Layer = Residual | Attention | Upsample | Downsample


def find_layers(root: str, names: Collection[str], form: str) -> tuple[Layer, ...]:
    """The layers between the first and the last convolution, in their order, as the names of parameters tell.

    root: "decoder" or "encoder". form: of upsampling.
    """
    middle: list[Layer] = [
        Residual(f"{root}.mid.0", False),
        Attention(f"{root}.mid.1"),
        Residual(f"{root}.mid.2", False),
    ]
    levels: list[Layer] = []
    i = 0
    while _has(names, f"{root}.conv_blocks.{i}."):
        level, j = f"{root}.conv_blocks.{i}", 0
        while _has(names, f"{level}.res.{j}."):
            levels.append(Residual(f"{level}.res.{j}", _has(names, f"{level}.res.{j}.nin_shortcut.")))
            if _has(names, f"{level}.attn.{j}."):
                levels.append(Attention(f"{level}.attn.{j}"))
            j += 1
        if _has(names, f"{level}.downsample."):
            levels.append(Downsample(f"{level}.downsample"))
        if _has(names, f"{level}.upsample."):
            levels.append(Upsample(f"{level}.upsample", form))
        i += 1
    return tuple(middle + levels if root == "decoder" else levels + middle)


def _has(names: Collection[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def parameter_names(graph: str, layer_list: Sequence[Layer]) -> tuple[str, ...]:
    """The parameters of a graph in the order of their use.

    The exporter wraps the convolutions of the encoder that compute in half precision, which adds ".conv" to a name.
    """
    decodes = graph == DECODE
    inner = "" if decodes else ".conv"

    def conv(name: str, part: str = inner) -> list[str]:
        return [f"{name}{part}.weight", f"{name}{part}.bias"]

    def norm(name: str) -> list[str]:
        return [f"{name}.gain", f"{name}.bias"]

    root = "decoder" if decodes else "encoder"
    names = ["codebook", *conv("post_quant_conv")] if decodes else []
    names += conv(f"{root}.conv_in", "")
    for layer in layer_list:
        match layer:
            case Residual(name, shortcut):
                for part in ("1", "2"):
                    names += norm(f"{name}.norm{part}") + conv(f"{name}.conv{part}")
                names += conv(f"{name}.nin_shortcut") if shortcut else []
            case Attention(name):
                names += norm(f"{name}.norm")
                names += [each for part in ("q", "k", "v", "proj_out") for each in conv(f"{name}.{part}")]
            case Upsample(name, form) if form == PHASES:
                names += [each for a in "01" for b in "01" for each in (f"{name}.weight_{a}{b}", f"{name}.bias")]
            case Upsample(name, form):
                names += conv(name if form == TRANSPOSED else f"{name}.conv")
            case Downsample(name):
                names += conv(f"{name}.conv")
    names += norm(f"{root}.norm_out") + conv(f"{root}.conv_out")
    return tuple(names if decodes else [*names, *conv("quant_conv", "")])
