"""What the service and a worker tell each other. All of it can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.output import Settings

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Item:
    """One image of a batch."""

    label: int
    seed: int
    index: int
    guidance: Guidance


@dataclass(frozen=True, kw_only=True)
class EditJob:
    """A picture to edit. image, mask: content of picture files. The mask is transparent where it is repainted. task
    None: inpaint if there is a mask or transparency, else refine. options: of `editing.options.Edit`."""

    image: bytes
    mask: bytes | None
    task: str | None
    steps: int | None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images that run at once.

    schedule None: the edit chooses it. previews: number of scales to send while it runs. first: if these are a part of
    a batch, the place of its first image there.
    """

    number: int
    items: tuple[Item, ...]
    schedule: ScaleSchedule | None
    sampling: Sampling
    previews: int = 0
    edit: EditJob | None = None
    max_tokens: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for a batch any more."""

    number: int


@dataclass(frozen=True)
class Ping:
    """Asks whether the worker is alive."""


@dataclass(frozen=True)
class Stop:
    """Ends the worker."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The worker has opened the bundle, and every allowed shape is warm.

    bundle: its sha256. measured: (schedule, guided, images, seconds) of generations that ran while it warmed up.
    """

    bundle: str
    manifest: Manifest
    backend: str
    measured: tuple[tuple[ScaleSchedule, bool, int, float], ...]


@dataclass(frozen=True)
class Refused:
    """The worker cannot open the bundle."""

    error: Exception


@dataclass(frozen=True)
class Beat:
    """The worker is alive."""


@dataclass(frozen=True)
class Preview:
    """The images of one scale of a running batch, from its image `first` on. size: (h, w) in tokens."""

    number: int
    first: int
    pixels: Pixels
    scale: int
    scales: int
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished batch. together: for each image, how many ran at once. seconds, decode: of the whole batch."""

    number: int
    pixels: Pixels
    settings: tuple[Settings, ...]
    together: tuple[int, ...]
    seconds: float
    decode: float


@dataclass(frozen=True)
class Failed:
    """A batch that was refused or went wrong. error: one that can be pickled. ends: whether the worker ends now."""

    number: int
    error: Exception
    ends: bool = False


@dataclass(frozen=True)
class Cancelled:
    """A batch that ended early because it was cancelled."""

    number: int
