"""The optional perceptual loss: distances between features of a VGG-16, whose weights the user provides as a file.

Source: Zhang et al., 2018 (LPIPS): squared differences of the unit-normalised features of five layers, averaged over
positions. Channels are weighted by LPIPS's `lin0` … `lin4` if the file holds them, and equally otherwise.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RunRefused
from ..parsing import refuse_failures
from ..pth import read_pth
from ..safetensors_files import SUFFIX, read_safetensors
from ..stored import StoredTensor

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Indices of the convolutions in `features` of a published VGG-16. Pooling comes before every row but the first."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIN_SIDE = 16  # pixels, because of four poolings


class Perceptual(nn.Module):
    """The perceptual distance of two batches of images (B, 3, H, W) in −1…1. Its weights are frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.rows = nn.ModuleList()
        inputs = 3
        for row, outputs in zip(CONVOLUTIONS, CHANNELS, strict=True):
            layers = nn.ModuleList()
            for place in row:
                layer = nn.Conv2d(inputs, outputs, 3, padding=1)
                layer.load_state_dict({part: state[f"features.{place}.{part}"] for part in ("weight", "bias")})
                layers.append(layer)
                inputs = outputs
            self.rows.append(layers)
        for i, channels in enumerate(CHANNELS):
            even = torch.full((1, channels, 1, 1), 1 / channels)
            self.register_buffer(f"lin{i}", state.get(f"lin{i}.model.1.weight", even).float())
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Mean distance, a scalar. It is 0 for images with a side below 16 pixels."""
        if min(image.shape[2:]) < MIN_SIDE:
            return image.new_zeros(())
        x = ((torch.cat([image, target]) + 1) / 2 - self.mean) / self.std
        distance = x.new_zeros((), dtype=torch.float32)
        for i, row in enumerate(self.rows):
            x = F.max_pool2d(x, 2) if i > 0 else x
            assert isinstance(row, nn.ModuleList)
            for layer in row:
                x = F.relu(layer(x))
            first, second = F.normalize(x.float(), dim=1).chunk(2)
            distance = distance + ((first - second).square() * getattr(self, f"lin{i}")).sum(1).mean()
        return distance


def load_perceptual(path: str | Path) -> Perceptual:
    """The perceptual loss with the VGG-16 weights in `path`, a .safetensors file or a .pth file with a bare state.

    Raises RunRefused for any other file.
    """
    path = Path(path)
    with refuse_failures(
        RunRefused,
        f"{path.name} does not hold the weights of a VGG-16",
        expected="the weights of a VGG-16, features.0.weight to features.28.bias, as .safetensors or .pth",
        fix="Set loss.perceptual_weights to the file of a published VGG-16, or loss.perceptual to 0.",
    ):
        content = read_safetensors(path).state if path.suffix == SUFFIX else read_pth(path)
        state = {name: value for name, value in content.items() if isinstance(value, StoredTensor)}
        expected = _shapes()
        if missing := expected.keys() - state.keys():
            raise ValueError(f"{', '.join(sorted(missing))} is missing")
        lins = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(CHANNELS)}
        used = {**expected, **{name: shape for name, shape in lins.items() if name in state}}
        if wrong := [name for name, shape in used.items() if state[name].shape != shape]:
            raise ValueError(f"{', '.join(wrong)} has the wrong shape")
        return Perceptual({name: state[name].read().float() for name in used})


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for row, outputs in zip(CONVOLUTIONS, CHANNELS, strict=True):
        for place in row:
            shapes[f"features.{place}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{place}.bias"] = (outputs,)
            inputs = outputs
    return shapes
