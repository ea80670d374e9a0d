"""The features of a set of images, from a run that keeps them or computed from pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import InvalidInput

from .network.features import FeatureNetwork, Features
from .pictures import Pictures, Pixels
from .runs.sampling import feature_arrays, shard_folder
from .runs.settings import PIXELS, POOL, SPATIAL, RunSettings
from .runs.shards import Arrays, ShardFolder, Sharding
from .statistics.moments import Moments, moments_of

SHARD_SIZE = 256
"""Pictures whose features are computed, and kept, at once."""

_PIXELS_AT_ONCE = 2**24
"""Pixels of all pictures that are held at once: 256 pictures of 256x256."""
FEWEST_IMAGES = 8
"""The confidence interval of FID compares two halves, and each needs 4 images."""

Advance = Callable[[str], None]


class FeatureSource(Protocol):
    """Features of images in order.

    count: number of images. labels: (N,) int64, the class of each image. classes: how many the model has. Both are None
    if they are not known. network: identity of the network.
    """

    count: int
    labels: NDArray[np.int64] | None
    classes: int | None
    network: str

    def blocks(self) -> Iterator[Features]:
        """The features, block by block. Raises ArtifactRefused."""


@dataclass(frozen=True)
class LoadedFeatures:
    """Features in memory. pool: (N, D) float32. spatial: moments of the other features, None if there are none.

    labels: (N,) int64, the class of each image. classes: how many the model has. Both are None if they are not known.
    """

    pool: NDArray[np.float32]
    moments: Moments
    spatial: Moments | None
    labels: NDArray[np.int64] | None
    network: str
    classes: int | None = None


def load(source: FeatureSource) -> LoadedFeatures:
    """Read a source once. Of the spatial features only the moments are kept. Raises InvalidInput, ArtifactRefused."""
    if source.count < FEWEST_IMAGES:
        got = f"A score needs at least {FEWEST_IMAGES} images, but the number of images is {source.count}."
        raise InvalidInput(got, expected=f"{FEWEST_IMAGES} images or more", fix="Pass more images.")
    blocks = source.blocks()
    first = next(blocks)
    pool, rows = np.empty((source.count, first.pool.shape[1]), np.float32), 0

    def spatial_blocks() -> Iterator[NDArray[np.float32]]:
        nonlocal rows
        for block in chain([first], blocks):
            pool[rows : rows + len(block.pool)] = block.pool
            rows += len(block.pool)
            if block.spatial is not None:
                yield block.spatial

    read = spatial_blocks()
    spatial = moments_of(read) if first.spatial is not None else None
    for _ in read:  # without spatial features nothing was read yet
        pass
    return LoadedFeatures(pool, moments_of([pool]), spatial, source.labels, source.network, source.classes)


class RunFeatures:
    """The features that a run keeps."""

    def __init__(self, folder: Path, settings: RunSettings, partial: bool) -> None:
        if settings.features is None:
            raise ValueError("the run keeps no features")
        self._shards = shard_folder(folder, settings)
        self._names = (POOL, SPATIAL) if settings.features.spatial else (POOL,)
        self._present = self._shards.require_complete(partial)
        self.numbers = _numbers(self._shards, self._present)
        self.count, self.network = len(self.numbers), settings.features.network
        self.labels: NDArray[np.int64] | None = self.numbers % settings.classes
        self.classes: int | None = settings.classes

    def blocks(self) -> Iterator[Features]:
        for shard in self._present:
            arrays = self._shards.read(shard, self._names)
            yield Features(arrays[POOL], arrays.get(SPATIAL))


class RunPictures:
    """The pixels that a run keeps, as pictures."""

    def __init__(self, folder: Path, settings: RunSettings, partial: bool) -> None:
        self._shards = shard_folder(folder, settings)
        self._present = self._shards.require_complete(partial)
        self.numbers = _numbers(self._shards, self._present)
        self.count, self.size = len(self.numbers), settings.size
        self.identity = hashlib.sha256(f"{settings.digest} {self.numbers.tolist()}".encode()).hexdigest()

    def blocks(self, start: int, rows: int) -> Iterator[Pixels]:
        del rows  # a shard is small enough
        passed = 0
        for shard in self._present:
            pixels = self._shards.read(shard, (PIXELS,))[PIXELS]
            if passed + len(pixels) > start:
                yield pixels[max(0, start - passed) :]
            passed += len(pixels)


def _numbers(shards: ShardFolder, present: list[int]) -> NDArray[np.int64]:
    """The numbers of the images in some shards."""
    spans = [np.arange(span.start, span.stop) for span in map(shards.sharding.images, present)]
    return np.concatenate([np.zeros(0, np.int64), *spans])


def blocks_of(pictures: Pictures) -> int:
    """The number of blocks in which the features of pictures are computed."""
    return Sharding(pictures.count, SHARD_SIZE).shards


class ComputedFeatures:
    """Features that a network computes from pictures.

    work: a folder in which they are kept, so that they are not computed again. Each set of pictures and network has a
    folder of its own in it.
    """

    def __init__(
        self,
        pictures: Pictures,
        network: FeatureNetwork,
        labels: NDArray[np.int64] | None = None,
        classes: int | None = None,
        work: Path | None = None,
        advance: Advance = lambda message: None,
    ) -> None:
        self._pictures, self._network, self._advance = pictures, network, advance
        self.count, self.network = pictures.count, network.identity
        self.labels, self.classes = labels, classes
        self._shards = None
        if work is not None:
            digest = hashlib.sha256(f"{pictures.identity} {network.identity}".encode()).hexdigest()
            pool, spatial = network.widths(pictures.size)
            arrays: Arrays = {POOL: ("float32", (pool,))}
            if spatial:
                arrays[SPATIAL] = "float32", (spatial,)
            self._shards = ShardFolder(work / digest[:16], digest, Sharding(pictures.count, SHARD_SIZE), arrays)

    def blocks(self) -> Iterator[Features]:
        if self._shards is None:
            yield from self._computed(0)
            return
        names = tuple(self._shards.arrays)
        self._shards.folder.mkdir(exist_ok=True)
        done = self._shards.done()
        count = blocks_of(self._pictures)
        kept = next((i for i in range(count) if i >= len(done) or done[i] != i), count)
        for shard in range(kept):
            arrays = self._shards.read(shard, names)
            self._advance(f"shard {shard + 1} of {count} kept from before")
            yield Features(arrays[POOL], arrays.get(SPATIAL))
        for shard, features in enumerate(self._computed(kept), kept):
            self._shards.write(shard, feature_arrays(features))
            yield features

    def _computed(self, shard: int) -> Iterator[Features]:
        """Features from a shard on, one shard at a time."""
        done = shard * SHARD_SIZE
        height, width = self._pictures.size
        rows = max(1, min(SHARD_SIZE, _PIXELS_AT_ONCE // (height * width)))
        held = list[Features]()
        for pixels in _cut(self._pictures.blocks(done, rows), rows):
            while len(pixels):
                some = pixels[: SHARD_SIZE - done % SHARD_SIZE]
                held.append(self._network.features(some))
                done, pixels = done + len(some), pixels[len(some) :]
                if done % SHARD_SIZE == 0 or done == self.count:
                    self._advance(f"{done:,} of {self.count:,} pictures")
                    yield _joined(held)
                    held = []


def _cut(blocks: Iterator[Pixels], rows: int) -> Iterator[Pixels]:
    """The same pictures in blocks of at most `rows`."""
    for block in blocks:
        for start in range(0, len(block), rows):
            yield block[start : start + rows]


def _joined(parts: list[Features]) -> Features:
    spatial = [part.spatial for part in parts if part.spatial is not None]
    return Features(np.concatenate([part.pool for part in parts]), np.concatenate(spatial) if spatial else None)
