"""What a bundle makes on ort-cpu: runs of images, of which the features are kept, and reconstructions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluation_options import BATCH, SEED, Options
from numpy.typing import NDArray

from flexvar_evaluation.features import LoadedFeatures, RunFeatures, load
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.runs.parts import Share
from flexvar_evaluation.runs.sampling import sample
from flexvar_evaluation.runs.settings import begin_or_resume
from flexvar_evaluation.runs.starting import describe_run, reporting
from flexvar_runtime import Bundle, FlexVARPipeline, ScaleSchedule
from flexvar_runtime.output import Settings


def pixels_of(bundle: Path, schedule: str) -> tuple[int, int]:
    """The size (height, width) of the images of a schedule."""
    factor = Bundle.open(bundle).manifest.model.downsampling
    height, width = ScaleSchedule.parse(schedule)[-1]
    return height * factor, width * factor


def sampled(
    bundle: Path, network: FeatureNetwork, schedule: str, count: int, options: Options, work: Path
) -> LoadedFeatures:
    """The features of a run of `count` images. Image i has class i mod 12. The run is kept in `work`."""
    wanted = ScaleSchedule.parse(schedule), options.guidance, options.sampling
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu", allow_unproved=True) as pipe:  # it may be emulated
        first = Settings(pipe.bundle.sha256, 0, SEED, 0, *wanted, pipe.backend.name)
        settings, batch = describe_run(pipe, first, count, network, batch_size=BATCH)
        folder = work / "runs" / settings.digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        begin_or_resume(folder, settings)
        with reporting(settings, Share()) as report:
            sample(pipe, folder, settings, batch, Share(), network, report)
    return load(RunFeatures(folder, settings, partial=False))


@dataclass(frozen=True)
class Reconstruction:
    """The tokenizer on held-out scenes. psnr: of the mean squared error, peak 2. usage: share of codes that occur."""

    images: int
    psnr: float
    usage: float
    pixels: NDArray[np.uint8]


def reconstructed(bundle: Path, images: NDArray[np.uint8]) -> Reconstruction:
    outputs, used = [], set[int]()
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu") as pipe:
        vocabulary = pipe.bundle.manifest.model.vocabulary
        for i in range(0, len(images), BATCH):
            tokens = pipe.encode(images[i : i + BATCH])
            used |= set(np.unique(tokens).tolist())
            outputs.append(pipe.decode(tokens))
    decoded = np.concatenate(outputs)
    error = ((decoded.astype(np.float64) - images.astype(np.float64)) / 127.5) ** 2
    return Reconstruction(len(images), 10 * math.log10(4 / error.mean()), len(used) / vocabulary, decoded)
