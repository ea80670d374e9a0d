"""An order: what one request asks of the model. Everything in it has been checked."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_runtime.output import Settings

from ..workers.messages import EditJob, Item, Pixels
from .costs import Work


@dataclass(frozen=True, kw_only=True)
class Order:
    """Images of one request. Image i draws from stream (seed, first_index + i).

    schedule: that of an edit may follow from its picture; then it is None, and `forecast_schedule` is near it.
    previews: number of scales to show. exact: the images share no batch with other requests.
    """

    label: int
    images: int
    seed: int
    first_index: int
    schedule: ScaleSchedule | None
    forecast_schedule: ScaleSchedule
    guidance: Guidance
    sampling: Sampling
    previews: int = 0
    streamed: bool = False
    exact: bool = False
    edit: EditJob | None = None
    max_tokens: int | None = None

    @property
    def guided(self) -> bool:
        return self.guidance.acts(self.forecast_schedule)

    @property
    def alone(self) -> bool:
        """Whether its images share no batch with those of other orders."""
        return self.exact or self.edit is not None

    def item(self, image: int) -> Item:
        return Item(self.label, self.seed, self.first_index + image, self.guidance)

    def work(self, images: int) -> Work:
        return Work.of(self.forecast_schedule, self.guided, images)

    def key(self, job: int) -> Hashable:
        """Orders of equal keys may share a batch: seeds, classes and guidance weights may differ."""
        rule = self.guidance.rule, self.guidance.max_side
        shared = (self.schedule, self.sampling, self.guided, rule, self.streamed, self.previews)
        return (*shared, job if self.alone else None)


@dataclass(frozen=True)
class Image:
    """A generated image: pixels (H, W, 3), how it was made, and how many images ran in its batch."""

    pixels: Pixels
    settings: Settings
    together: int


@dataclass(frozen=True)
class Scale:
    """One scale of an image while it is generated. size: (h, w) in tokens."""

    pixels: Pixels
    index: int
    count: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Spent:
    """Seconds of a finished job: in the queue, generating (with the decoder), and in the decoder."""

    queue: float
    generate: float
    decode: float
