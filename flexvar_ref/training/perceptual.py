"""The optional perceptual loss: distances between features of a VGG-16, whose weights the user provides as a file.

Source: Zhang et al., 2018 (LPIPS): squared differences of the unit-normalised features of five layers, averaged over
positions. Channels are weighted by LPIPS's `lin0` … `lin4` if the file holds them, and equally otherwise.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import RunRefused

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
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        expected = _shapes()
        wrong = [name for name, shape in expected.items() if tuple(state[name].shape) != shape]
        wrong += [f"lin{i}" for i, c in enumerate(CHANNELS) if _lin(state, i) not in (None, (1, c, 1, 1))]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} has the wrong shape")
        return Perceptual({name: value.float() for name, value in state.items() if isinstance(value, Tensor)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise _not_a_vgg16(path, error) from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise _not_a_vgg16(path, error) from error


def _not_a_vgg16(path: Path, error: Exception) -> RunRefused:
    reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return RunRefused(
        f"{path.name} does not hold the weights of a VGG-16: {reason.rstrip('.'):.200}.",
        expected="the weights of a VGG-16, features.0.weight to features.28.bias, as .safetensors or .pth",
        fix="Set loss.perceptual_weights to the file of a published VGG-16, or loss.perceptual to 0.",
    )


def _lin(state: dict[str, Tensor], i: int) -> tuple[int, ...] | None:
    weight = state.get(f"lin{i}.model.1.weight")
    return None if weight is None else tuple(weight.shape)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for row, outputs in zip(CONVOLUTIONS, CHANNELS, strict=True):
        for place in row:
            shapes[f"features.{place}.weight"] = (outputs, inputs, 3, 3)
            shapes[f"features.{place}.bias"] = (outputs,)
            inputs = outputs
    return shapes
