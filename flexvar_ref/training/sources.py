"""From `--data` to what training and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import Data
from .data import Dataset, ImageCHW, ImageFolder, Scenes

SCENES = "scenes"


@dataclass(frozen=True)
class Spread:
    """`count` samples spread evenly over a data set whose order is that of its classes."""

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
    """The training and the held-out data set of a folder or of the built-in scenes.

    A folder with the folders `train` and `val` has its own held-out images; in any other the evaluation looks at
    images that are trained on. Raises DataError.
    """
    if data == SCENES:
        return Scenes(config.size, config.seed), Scenes(config.size, config.seed + 1)
    root = Path(data)
    split = (root / "train").is_dir() and (root / "val").is_dir()
    train = ImageFolder(root / "train" if split else root, config.size, config.seed, flip=config.flip)
    held_out = ImageFolder(root / "val" if split else root, config.size, config.seed, training=False, check=split)
    return train, Spread(held_out, min(config.held_out, len(held_out)))
