"""A small classifier of scenes, independent of the demo model: another network, trained on other scenes.

This is the only part of the demo's evaluation that needs torch. `scene_network.py` writes the classifier as a feature
network for `flexvar evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexvar_ref.training import scenes
from flexvar_runtime.files.atomic import atomic_write

SIDE = 64  # pixels of the shorter side, to which images are scaled
LONGEST = scenes.MAX_SIDE  # pixels of the longer side at most, before and after scaling
WIDTHS = (32, 64, 128, 128)
TRAIN_SEED, HELD_OUT_SEED, REFERENCE_SEED, FLOOR_SEED = 7001, 7002, 7003, 7004
"""Seeds of scenes. The training and held-out scenes of the demo model have the seeds 0 and 1."""
SIZES = ((64, 64), (64, 64), (64, 96), (96, 64))  # training covers every aspect ratio that is judged
SCENES, EPOCHS, BATCH = 9600, 4, 48
"""Scenes and epochs of the training, and scenes of one step."""
Pixels = NDArray[np.uint8]
Say = Callable[[str], None]


class SceneClassifier(nn.Module):
    """Maps images (B, 3, H, W) in −1…1, of any size, to features (B, 128) and logits (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in WIDTHS:
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(image).mean((2, 3))
        return features, self.head(features)


def scaled(images: Pixels) -> Tensor:
    """Images (N, H, W, 3) uint8 as (N, 3, H, W) in −1…1, scaled by averaging.

    The shorter side becomes 64 pixels. The longer one keeps the proportions, up to LONGEST pixels.
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    shorter = min(x.shape[2:])
    size = [min(LONGEST, (2 * SIDE * side + shorter) // (2 * shorter)) for side in x.shape[2:]]
    return x if size == list(x.shape[2:]) else F.interpolate(x, size=size, mode="area")


def real(seed: int, count: int, size: tuple[int, int], start: int = 0) -> tuple[Pixels, NDArray[np.int64]]:
    """Scenes of the data set, (N, H, W, 3) uint8, and their labels. The label of scene i is (start + i) mod 12."""
    drawn = [scenes.render(seed, start + index, size) for index in range(count)]
    return np.stack([image for image, _ in drawn]), np.array([label for _, label in drawn], np.int64)


def trained(path: Path, count: int = SCENES, epochs: int = EPOCHS, say: Say = lambda _: None) -> SceneClassifier:
    """The classifier in `path`. It is trained first if the file does not exist."""
    torch.manual_seed(TRAIN_SEED)
    model = SceneClassifier(len(scenes.CLASSES))
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    groups, share = [], count // len(SIZES)
    for i, size in enumerate(SIZES):
        say(f"drawing {share} scenes of {size[0]}x{size[1]}")
        groups.append(real(TRAIN_SEED, share, size, start=i * share))
    steps = epochs * len(SIZES) * (share // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(share)[: share // BATCH * BATCH].view(-1, BATCH).numpy()
        for rows in order:
            for images, labels in groups:
                logits = model(_varied(scaled(images[rows])))[1]
                loss = F.cross_entropy(logits, torch.from_numpy(labels[rows]), label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        say(f"classifier: epoch {epoch + 1}/{epochs}, loss {loss.item():.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        save_file(model.state_dict(), partial)
    return model.eval()


def _varied(x: Tensor) -> Tensor:
    """Images that are blurred, brightened and mirrored at random, so that the fine pixels do not decide."""
    if torch.rand(()) < 0.3:
        small = F.interpolate(x, scale_factor=0.5, mode="area")
        x = F.interpolate(small, size=x.shape[2:], mode="bilinear")
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    return x * (0.9 + 0.2 * torch.rand(len(x), 1, 1, 1)) + 0.1 * torch.randn(len(x), 3, 1, 1) * 0.5
