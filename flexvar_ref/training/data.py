"""What training draws from: image folders with the published augmentation, and the built-in scenes.

A sample is a function of the data set and of its index, never of what was drawn before: training resumes at sample
step · batch, and any number of workers may draw side by side.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from . import scenes
from .scenes.stream import Stream

log = logging.getLogger(__name__)

ImageCHW = NDArray[np.float32]
Size = tuple[int, int]
"""(height, width) in pixels."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MID_RESOLUTION = 1.125
"""How much larger than the crop an image is before it is cropped, as published."""
_CROPS, _ORDER = 0, 1  # streams of a seed


class DataError(ValueError):
    """Data that training cannot use. Says got, expected and fix."""

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.got, self.expected, self.fix = got, expected, fix


class Dataset(Protocol):
    """Labelled images without end: `sample(i)` is defined for every i ≥ 0 and always the same."""

    @property
    def classes(self) -> tuple[str, ...]:
        """What the labels 0, 1, … show."""

    @property
    def length(self) -> int | None:
        """Samples an epoch, or None if no two samples are alike."""

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        """Image, float32 (3, H, W) in −1..1, and its label."""


def batch(dataset: Dataset, start: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Samples `start` to `start + count − 1`: images, float32 (B, 3, H, W) in −1..1, and labels, int64 (B,)."""
    images, labels = zip(*(dataset.sample(index) for index in range(start, start + count)), strict=True)
    return np.stack(images), np.array(labels, np.int64)


def to_signed(image_HWC: NDArray[np.uint8]) -> ImageCHW:
    """Float32 (3, H, W) in −1..1 of a picture, uint8 (H, W, 3)."""
    return np.ascontiguousarray(image_HWC.transpose(2, 0, 1)).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _checked(size: int | Size) -> Size:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise DataError(f"size {size}", expected="(height, width) of at least one pixel", fix="choose another size")
    return height, width


@dataclass(frozen=True)
class Scenes:
    """The built-in scenes at a size, without end, labels in turn. Another seed is a split held out from this one."""

    size: int | Size
    seed: int = 0

    @property
    def classes(self) -> tuple[str, ...]:
        return scenes.CLASSES

    @property
    def length(self) -> None:
        return None

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        image, label = scenes.render(self.seed, index, _checked(self.size))
        return to_signed(image), label


@dataclass(frozen=True)
class Augmentation:
    """Resize, crop, flip, as published: the image covers `MID_RESOLUTION` times the crop, and the crop is taken at
    random in training, from the centre in evaluation. `flip`: left and right change places half of the time.
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
        # Only what the crop shows is resized, with the pixels around it in the filter's reach: same values, less work.
        x, y = image.width / wide, image.height / tall
        box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
        pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box))
        mirrored = self.flip and self.training and stream.chance(0.5)
        return to_signed(pixels[:, ::-1] if mirrored else pixels)


@dataclass
class ImageFolder:
    """Images in ImageNet's layout, root/class/…/image.{png,jpg,jpeg,webp}; classes in the order of their names.

    size: of the crop, (height, width) or one side; training: a new order every epoch and random crops, else the order
    of the names and centre crops; flip: also mirrored images, in training; check: look at every file first.
    A file that cannot be read is skipped: the next one in the order takes its place, and `skipped` counts it. Photos
    are turned as their camera says.
    Raises DataError where there is no class folder or no readable image.
    """

    root: Path | str
    size: int | Size
    seed: int = 0
    training: bool = True
    flip: bool = False
    check: bool = True
    skipped: int = field(default=0, init=False)
    """Files known to be unreadable."""

    def __post_init__(self) -> None:
        root = Path(self.root)
        folders = sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []
        if not folders:
            found = "no class folder in it" if root.is_dir() else "which is no folder"
            raise DataError(
                f"{root}, {found}",
                expected="root/class/image.png",
                fix="move the images into one folder for each class",
            )
        self.classes = tuple(folder.name for folder in folders)
        files = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in SUFFIXES and path.is_file()
        ]
        self._bad: set[Path] = set()
        self._augment = Augmentation(_checked(self.size), self.training, self.flip)
        reasons = {path: reason for path, _ in files if self.check and (reason := _unreadable(path))}
        self._files = [(path, label) for path, label in files if path not in reasons]
        if reasons:
            self.skipped = len(reasons)
            path, reason = next(iter(reasons.items()))
            log.warning(
                "skipped %d of %d images that cannot be read, the first: %s: %s", len(reasons), len(files), path, reason
            )
        if not self._files:
            raise DataError(
                f"no readable image in {root} ({self.skipped} unreadable)",
                expected=f"{', '.join(sorted(SUFFIXES))} files below {self.classes[0]} and the like",
                fix="check the path and the files",
            )

    @property
    def length(self) -> int:
        return len(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> tuple[ImageCHW, int]:
        """Image `index`, counted through all epochs: float32 (3, H, W) in −1..1 and its label."""
        epoch, place = divmod(index, len(self._files))
        for step in range(len(self._files)):
            position = (place + step) % len(self._files)
            path, label = self._files[
                _order(self.seed, epoch, len(self._files))[position] if self.training else position
            ]
            try:
                image = _open(path)
            except Exception as reason:  # Pillow's decoders raise almost anything for a damaged file
                self._skip(path, reason)
                continue
            return self._augment(image, Stream(self.seed, index, _CROPS)), label
        raise DataError(
            f"{len(self._files)} images in {self.root}, none of them readable",
            expected="at least one readable image",
            fix="check the files",
        )

    def _skip(self, path: Path, reason: Exception) -> None:
        if path not in self._bad:
            if not self._bad:
                log.warning(
                    "skipping images that cannot be read (`skipped` counts them), the first: %s: %s", path, reason
                )
            self._bad.add(path)
            self.skipped += 1


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of an epoch: a permutation of `count`."""
    return np.argsort(Stream(seed, epoch, _ORDER).uniform(count), kind="stable")


def _open(path: Path) -> Image.Image:
    """The decoded image, upright."""
    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def _unreadable(path: Path) -> str | None:
    """Why a file is no image, by its headers and checksums, or None. A damaged JPEG shows only when it is decoded."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as reason:  # Pillow's decoders raise almost anything for a damaged file
        return str(reason) or type(reason).__name__
    return None
