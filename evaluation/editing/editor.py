"""Edits many pictures with one pipeline and the same options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.model.guidance import Guidance
from flexvar_runtime.model.sampling import Sampling
from flexvar_runtime.output import Settings

from ..judging import Labels
from ..pictures import Pixels
from ..runs.sampling import images_of
from ..runs.starting import describe_run


@dataclass(frozen=True)
class LabelledPictures:
    """pixels: (N, H, W, 3) uint8. labels: (N,) int64."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """Options of all edits. Picture i draws from stream (seed, i).

    batch: pictures that are edited at once. feather: pixels over which a pasted picture is blended.
    """

    guidance: Guidance
    sampling: Sampling
    seed: int
    batch: int = 20
    feather: int = 4


class Editor:
    """A pipeline with options. Its methods raise the errors of the pipeline."""

    def __init__(self, pipe: FlexVARPipeline, options: EditOptions) -> None:
        self.pipe, self.options = pipe, options

    def edited(self, pixels: Pixels, labels: Labels | None, task: str, **settings: Any) -> Pixels:
        """Edit pictures. labels: None edits without a class, and so without guidance. settings: of `pipe.edit`."""
        parts = []
        for start in range(0, len(pixels), self.options.batch):
            rows = slice(start, start + self.options.batch)
            output = self.pipe.edit(
                list(pixels[rows]),
                task,
                labels=None if labels is None else labels[rows].tolist(),
                guidance=None if labels is None else self.options.guidance,
                sampling=self.options.sampling,
                seed=self.options.seed,
                first_index=start,
                **settings,
            )
            parts.append(output.images)
        return np.concatenate(parts)

    def pasted(self, pixels: Pixels, labels: Labels | None, task: str, **settings: Any) -> Pixels:
        """Edit pictures and put their own pixels back where they are to stay."""
        return self.edited(pixels, labels, task, paste=True, feather=self.options.feather, **settings)

    def reconstructed(self, pixels: Pixels) -> Pixels:
        """The pictures after they went through the tokenizer."""
        blocks = (pixels[i : i + self.options.batch] for i in range(0, len(pixels), self.options.batch))
        return np.concatenate([self.pipe.decode(self.pipe.encode(block)) for block in blocks])

    def generated(self, schedule: ScaleSchedule, count: int) -> Pixels:
        """The images of a run of `count` images: image i has class i mod the number of classes."""
        options, pipe = self.options, self.pipe
        wanted = schedule, options.guidance, options.sampling
        first = Settings(pipe.bundle.sha256, 0, options.seed, 0, *wanted, pipe.backend.name)
        settings, batch = describe_run(pipe, first, count, None, batch_size=options.batch)
        return np.concatenate(list(images_of(pipe, settings, range(count), batch)))
