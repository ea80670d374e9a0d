"""An optional perceptual term: distances between the features of a VGG-16 whose weights the user brings as a file.

Source: Zhang et al., 2018 (LPIPS): unit-normalised features of five layers, squared differences, averaged over
positions; weighted per channel where the file holds LPIPS's `lin0` … `lin4`, evenly otherwise.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import RunRefused

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of the convolutions in `features`, as every published VGG-16 numbers them; a pooling comes before each row."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 16  # pixels a side: four poolings


class Perceptual(nn.Module):
    """Frozen features; call it with two images (B, 3, H, W) in −1…1."""

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
        """Mean distance; 0 where a side is below 16 pixels."""
        if min(image.shape[2:]) < SMALLEST:
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
    """VGG-16 features from `path` (.safetensors, or .pth with a bare state). Raises RunRefused for any other file."""
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
            raise ValueError(f"another shape of {', '.join(wrong)}")
        return Perceptual({name: value.float() for name, value in state.items() if isinstance(value, Tensor)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise _refused(path, error) from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise _refused(path, error) from error


def _refused(path: Path, error: Exception) -> RunRefused:
    reason = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return RunRefused(
        f"{path.name} ({reason:.200})",
        expected="the weights of a VGG-16, features.0.weight to features.28.bias, as .safetensors or .pth",
        fix="pass the file of a published VGG-16, or set loss.perceptual = 0",
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
