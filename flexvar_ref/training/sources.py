"""The training and held-out data sets that `--data` names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .config import Data
from .data import Dataset, ImageCHW, ImageFolder, Scenes

SCENES = "scenes"


@dataclass(frozen=True)
class EvenSubset:
    """`count` samples at even distances in a folder, so that all classes are in it."""

    dataset: ImageFolder
    count: int

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    @property
    def length(self) -> int:
        return self.count

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        return self.dataset.sample(index % self.count * len(self.dataset) // self.count)


def open_data(data: str, config: Data) -> tuple[Dataset, Dataset]:
    """The training and the held-out data set. data: an image folder or "scenes".

    A folder with subfolders `train` and `val` has its own held-out images. With any other folder the evaluation uses
    training images. Raises DataError.
    """
    if data == SCENES:
        return Scenes(config.size, config.seed), Scenes(config.size, config.seed + 1)
    root = Path(data)
    split = os.path.isdir(root / "train") and os.path.isdir(root / "val")
    train = ImageFolder(root / "train" if split else root, config.size, config.seed, flip=config.flip)
    held_out = ImageFolder(root / "val" if split else root, config.size, config.seed, training=False, check=split)
    if train.classes != held_out.classes:
        raise DataError(
            f"{root / 'train'} and {root / 'val'} hold different class folders, so labels would not mean the same.",
            expected="the same class folders in both",
            fix="Give both folders the same class folders.",
        )
    return train, EvenSubset(held_out, min(config.held_out, len(held_out)))
