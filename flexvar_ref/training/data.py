"""Data sets for training: image folders with the published augmentation, and the built-in scenes.

A sample depends on the data set and its index only, not on the samples before it. So training can resume at any sample,
and several workers can prepare samples at the same time.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from . import scenes
from .pictures import SUFFIXES, read_picture, unreadable
from .scenes.stream import Stream

log = logging.getLogger(__name__)

ImageCHW = NDArray[np.float32]
Size = tuple[int, int]
"""(height, width) in pixels."""

MID_RESOLUTION = 1.125
"""Size of a resized image relative to its crop, as published."""
_CROPS, _ORDER = 0, 1  # streams of a seed


class Dataset(Protocol):
    """An endless data set of labelled images. `sample(i)` is defined for every i ≥ 0 and always returns the same."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0, 1, …"""

    @property
    def length(self) -> int | None:
        """Number of samples in an epoch, or None if samples never repeat."""

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        """Sample `index`: the image, float32 (3, H, W) in −1…1, and its label."""


def batch(dataset: Dataset, start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Samples `start` to `start + count − 1`: images, float32 (B, 3, H, W) in −1…1, and labels, int64 (B,)."""
    images, labels = zip(*(dataset.sample(index) for index in range(start, start + count)), strict=True)
    return np.stack(images), np.array(labels, np.int64)


def to_signed(image_HWC: NDArray[np.uint8]) -> ImageCHW:
    """An image, uint8 (H, W, 3), as float32 (3, H, W) in −1…1."""
    return np.ascontiguousarray(image_HWC.transpose(2, 0, 1)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _as_size(size: int | Size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise DataError(
            f"size is {size}, but height and width must be at least one pixel.",
            expected="(height, width) of at least one pixel",
            fix="Choose another size.",
        )
    return height, width


@dataclass(frozen=True)
class Scenes:
    """The built-in scenes at one size. The labels come in turn, and samples never repeat.

    Data sets with different seeds share no scenes, so another seed gives held-out data.
    """

    size: int | Size
    seed: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        return scenes.CLASSES

    @property
    def length(self) -> None:
        return None

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        image, label = scenes.render(self.seed, index, _as_size(self.size))
        return to_signed(image), label


@dataclass(frozen=True)
class Augmentation:
    """Resize, crop and flip, as published. The result is an image, float32 (3, H, W) in −1…1.

    The image is resized so that it covers `MID_RESOLUTION` times the crop. size: (height, width) of the crop.
    training: crop at random, otherwise from the centre. flip: in training, mirror half of the images.
    """

    size: Size
    training: bool = True
    flip: bool = False

    def __call__(self, image: Image.Image, stream: Stream) -> ImageCHW:
        height, width = self.size
        scale = max(round(MID_RESOLUTION * height) / image.height, round(MID_RESOLUTION * width) / image.width)
        tall, wide = max(height, round(image.height * scale)), max(width, round(image.width * scale))
        if self.training:
            top, left = stream.whole(0, tall - height), stream.whole(0, wide - width)
        else:
            top, left = round((tall - height) / 2), round((wide - width) / 2)
        # Resizing only the crop gives the same values as resizing the whole image, with less work.
        x, y = image.width / wide, image.height / tall
        box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box))
        mirrored = self.flip and self.training and stream.chance(0.5)
        return to_signed(pixels[:, ::-1] if mirrored else pixels)


@dataclass
class ImageFolder:
    """Images in ImageNet's layout, root/class/…/image.png. Labels follow the sorted class names.

    root: the folder. size: (height, width) of the crop, or one side. seed: seed of the order and the crops.
    training: a new random order in every epoch and random crops. Otherwise files in the order of their names and centre
    crops.
    flip: in training, mirror half of the images.
    check: check every file when the folder is opened.

    `read_picture` reads the images. An image that cannot be read is replaced by the next one and counted in `skipped`.
    Files whose names end otherwise are counted in `ignored`. Raises DataError if there is no class folder, or if one
    holds no readable image.
    """

    root: Path | str
    size: int | Size
    seed: int = 0
    training: bool = True
    flip: bool = False
    check: bool = True
    skipped: int = field(default=0, init=False)
    """Number of images found to be unreadable so far."""
    ignored: int = field(default=0, init=False)
    """Number of files in class folders that are not images by their names."""

    def __post_init__(self) -> None:
        root = Path(self.root)
        folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if os.path.isdir(root) else []
        if not folders:
            raise DataError(
                f"{root} holds no class folders." if os.path.isdir(root) else f"{root} is not a folder.",
                expected="root/class/image.png",
                fix="Pass a folder with one folder of images for each class.",
            )
        self.classes = tuple(folder.name for folder in folders)
        everything = [(path, label) for label, folder in enumerate(folders) for path in _files_in(folder)]
        files = [(path, label) for path, label in everything if path.suffix.lower() in SUFFIXES]
        self.ignored = len(everything) - len(files)
        if self.ignored:
            other = next(path for path, _ in everything if path.suffix.lower() not in SUFFIXES)
            log.warning("ignoring %d files that do not end as images do. The first is %s", self.ignored, other)
        self._bad: set[Path] = set()
        self._augment = Augmentation(_as_size(self.size), self.training, self.flip)
        reasons = {path: reason for path, _ in files if self.check and (reason := unreadable(path))}
        self._files = [(path, label) for path, label in files if path not in reasons]
        if reasons:
            self.skipped = len(reasons)
            path, reason = next(iter(reasons.items()))
            log.warning(
                "skipping %d of %d images that cannot be read. The first is %s: %s",
                len(reasons),
                len(files),
                path,
                reason,
            )
        if not self._files:
            raise DataError(
                f"{root} holds no readable image in its class folders ({self.skipped} cannot be read).",
                expected=f"{', '.join(sorted(SUFFIXES))} files in folders like {self.classes[0]}",
                fix=f"Check the path and the files. Images must end in {', '.join(sorted(SUFFIXES))}.",
            )
        labels = {label for _, label in self._files}
        if empty := [name for label, name in enumerate(self.classes) if label not in labels]:
            raise DataError(
                f"{len(empty)} class folders in {root} hold no readable image. The first is {empty[0]!r}.",
                expected="an image in each class folder",
                fix="Remove these folders, or add images to them.",
            )

    @property
    def length(self) -> int:
        return len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        """Sample `index`, counted over all epochs: the image, float32 (3, H, W) in −1…1, and its label."""
        epoch, place = divmod(index, len(self._files))
        for step in range(len(self._files)):
            position = (place + step) % len(self._files)
            path, label = self._files[
                _order(self.seed, epoch, len(self._files))[position] if self.training else position
            ]
            try:
                image = read_picture(path)
            except Exception as reason:  # Pillow's decoders raise almost anything for a damaged file
                self._skip(path, reason)
                continue
            return self._augment(image, Stream(self.seed, index, _CROPS)), label
        raise DataError(
            f"None of the {len(self._files)} images in {self.root} can be read.",
            expected="at least one readable image",
            fix="Check the files.",
        )

    def _skip(self, path: Path, reason: Exception) -> None:
        if path not in self._bad:
            if not self._bad:
                log.warning("skipping images that cannot be read. The first is %s: %s", path, reason)
            self._bad.add(path)
            self.skipped += 1


def _files_in(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, without hidden ones, in the order of their names."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the files in an epoch: a permutation of 0 … count − 1."""
    return np.argsort(Stream(seed, epoch, _ORDER).uniform(count), kind="stable")
