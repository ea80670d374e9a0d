"""How a run is described and reported, for the commands that sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.cli.console import steps
from flexvar_runtime.output import Settings

from ..network.features import FeatureNetwork
from .parts import Share
from .sampling import Progress, Report
from .settings import PUBLISHED_COUNT, KeptFeatures, RunSettings
from .shards import Sharding

CPU_BATCH, GPU_BATCH, SHARD_SIZE = 8, 64, 256
"""Default numbers of images: generated at once, and in a shard."""
MOST_IMAGES = 10**8
"""Most images of a run."""


def describe_run(
    pipe: FlexVARPipeline,
    first: Settings,
    count: int,
    network: FeatureNetwork | None,
    *,
    shard_size: int = SHARD_SIZE,
    batch_size: int | None = None,
    pixels: bool = False,
    png: bool = False,
) -> tuple[RunSettings, int]:
    """The settings of a run, and the number of images to generate at once.

    first: settings of which label and index are replaced. network: None keeps pixels in place of features. pixels:
    whether to keep both. batch_size: None means the default of the device. Raises InvalidInput.
    """
    Sharding(count, shard_size).check()
    device, factor = pipe.backend.device, pipe.model.downsampling
    default = CPU_BATCH if device is None else GPU_BATCH
    batch = min(batch_size or default, shard_size)
    height, width = (tokens * factor for tokens in first.schedule[-1])
    features = None
    if network is not None:
        pool, spatial = network.widths((height, width))
        features = KeptFeatures(network=network.identity, pool=pool, spatial=spatial)
    settings = RunSettings(
        first=replace(first, label=0, index=0),
        count=count,
        classes=pipe.model.classes,
        size=(height, width),
        shard_size=shard_size,
        batch=None if device is None else batch,
        device=None if device is None else device.name,
        features=features,
        pixels=pixels or network is None,
        png=png,
    )
    return settings, batch


Seed = Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of all images. Image i has index i.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Number of images that are generated at once. The default is 64 on a GPU, else 8."),
]
NetworkOnSameDevice = Annotated[
    str | None,
    typer.Option(help="Where the feature network runs: ort-cpu or ort-cuda. The default is where the model runs."),
]


def open_network(
    path: Path, pipe: FlexVARPipeline, backend: str | None, device: str | None, threads: int | None
) -> FeatureNetwork:
    """Open a feature network beside a pipeline. backend: None means the same kind of processor.

    Raises the errors of `FeatureNetwork.open`.
    """
    if backend is None:
        backend = "ort-cpu" if pipe.backend.device is None else "ort-cuda"
    on_gpu = backend == "ort-cuda"
    return FeatureNetwork.open(path, backend, device if on_gpu else None, None if on_gpu else threads)


@contextmanager
def reporting(settings: RunSettings, share: Share) -> Iterator[Report]:
    """Reports each shard as progress, with the rate, the time left and a forecast for 50,000 images."""
    own = len(range(share.number, settings.sharding.shards, share.count))
    with steps(own, "sample") as advance:

        def report(shard: int, progress: Progress) -> None:
            advance(
                f"{progress.done:,} of {progress.count:,} images by all processes, {progress.rate:.3g} images/s, "
                f"{duration(progress.seconds_left)} left; {PUBLISHED_COUNT:,} would take "
                f"{duration(PUBLISHED_COUNT / progress.rate)}"
            )

        yield report


def duration(seconds: float) -> str:
    """Seconds for people, such as "41 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
