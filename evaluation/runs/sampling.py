"""Makes the shards of a run: generates images and keeps their features, their pixels or both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.output import Settings
from flexvar_runtime.pictures.png import save_png

from ..network.features import FeatureNetwork, Features
from .claims import Claim, claimed
from .parts import Share
from .settings import PICTURES, PIXELS, POOL, SHARDS, SPATIAL, RunSettings
from .shards import ShardFolder

_SPARE = 64 * 2**20  # bytes of disk that stay free

Pixels = NDArray[np.uint8]


class Report(Protocol):
    def __call__(self, shard: int, progress: Progress) -> None:
        """Called after every shard that this process has made."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. done: images, by all processes. rate: images in a second, by all processes, since the start."""

    done: int
    count: int
    rate: float

    @property
    def seconds_left(self) -> float:
        return (self.count - self.done) / self.rate


@dataclass(frozen=True)
class Sampled:
    """What a process did. made: images by this process. done: images that the run has now. seconds: of this process."""

    made: int
    done: int
    count: int
    seconds: float

    @property
    def complete(self) -> bool:
        return self.done == self.count


def shard_folder(folder: Path, settings: RunSettings) -> ShardFolder:
    return ShardFolder(folder / SHARDS, settings.digest, settings.sharding, settings.arrays)


def images_of(pipe: FlexVARPipeline, settings: RunSettings, numbers: range, batch: int) -> Iterator[Pixels]:
    """The images with these numbers, batch by batch, each (b, H, W, 3) uint8."""
    first = settings.first
    for start in range(numbers.start, numbers.stop, batch):
        some = range(start, min(start + batch, numbers.stop))
        labels = [settings.label(number) for number in some]
        yield pipe(labels, first.schedule, first.guidance, first.sampling, first.seed, start).images


def sample(
    pipe: FlexVARPipeline,
    folder: Path,
    settings: RunSettings,
    batch: int,
    share: Share,
    network: FeatureNetwork | None,
    report: Report,
) -> Sampled:
    """Make the shards of a share that do not exist yet. Any number of processes may do so at once.

    batch: images that are generated at once; `settings.batch` if that is not None. network: computes features, if the
    run keeps them. Raises EnvironmentFailed if the disk has too little space, and the errors of the pipeline.
    """
    shards = shard_folder(folder, settings)
    shards.folder.mkdir(exist_ok=True)
    if settings.png:
        (folder / PICTURES).mkdir(exist_ok=True)
    for shard in shards.done():
        shards.check(shard)
    require_space(folder, settings, images_done(shards))
    begun, started, made = time.monotonic(), images_done(shards), 0
    while True:
        before = made
        for shard in range(shards.sharding.shards):
            if not share.has(shard) or shards.has(shard):
                continue
            with claimed(shards.claim(shard)) as claim:
                if claim is None or shards.has(shard):
                    continue
                shards.write(
                    shard, _content(pipe, folder, settings, shards.sharding.images(shard), batch, network, claim)
                )
            made += len(shards.sharding.images(shard))
            done, seconds = images_done(shards), time.monotonic() - begun
            report(shard, Progress(done, settings.count, (done - started) / seconds))
        if made == before:  # what is left is claimed by other processes, or there is nothing left
            return Sampled(made, images_done(shards), settings.count, time.monotonic() - begun)


def _content(
    pipe: FlexVARPipeline,
    folder: Path,
    settings: RunSettings,
    numbers: range,
    batch: int,
    network: FeatureNetwork | None,
    claim: Claim,
) -> dict[str, NDArray[Any]]:
    """The arrays of a shard. Writes the PNG files of its images, if the run has some."""
    parts = list[Pixels]()
    for images in images_of(pipe, settings, numbers, batch):
        parts.append(images)
        claim.touch()
    pixels = np.concatenate(parts)
    for number, image in zip(numbers, pixels, strict=True) if settings.png else ():
        own = image_settings(settings, number)
        save_png(folder / PICTURES / f"{number:06d}.png", image, own.to_json(), force=True)
    # features of the whole shard at once: they must not depend on the batch of the generation
    arrays: dict[str, NDArray[Any]] = {} if network is None else feature_arrays(network.features(pixels))
    return arrays | ({PIXELS: pixels} if settings.pixels else {})


def feature_arrays(features: Features) -> dict[str, NDArray[Any]]:
    """Features as the arrays of a shard."""
    spatial = {} if features.spatial is None else {SPATIAL: features.spatial}
    return {POOL: features.pool, **spatial}


def image_settings(settings: RunSettings, number: int) -> Settings:
    """The settings that make image `number` again."""
    return replace(settings.first, label=settings.label(number), index=number)


def require_space(folder: Path, settings: RunSettings, done: int, extra: int = 0) -> None:
    """Raise EnvironmentFailed if the disk has too little space for the images that are left, and `extra` bytes."""
    needed = (settings.count - done) * settings.bytes_per_image() + extra
    free = shutil.disk_usage(folder).free
    if needed + _SPARE > free:
        raise EnvironmentFailed(
            f"{folder} needs {needed / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free.",
            expected="enough free space",
            fix="Free space, choose another directory, or keep features only: --network without --npz and --png.",
        )


def images_done(shards: ShardFolder) -> int:
    """How many images exist already."""
    return sum(len(shards.sharding.images(shard)) for shard in shards.done())
