"""What a generation returns, and the settings that make it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ._version import __version__
from .deadline import Choice
from .edit import Edit
from .errors import ArtifactRefused, FlexVARError
from .guidance import Guidance
from .noise import check_index, check_seed, check_whole
from .sampling import Sampling
from .schedule import ScaleSchedule

SETTINGS_VERSION = 1


@dataclass(frozen=True)
class ScaleTime:
    """Seconds of one scale: the transformer's step (inputs included), and sampling where the host does it."""

    size: tuple[int, int]
    step: float
    sample: float


@dataclass(frozen=True)
class Timings:
    """Seconds of one generation, all images together.

    `condition`: all before the first scale (checks, condition, and what is opened or allocated the first time);
    `scales` in order; `total` is wall time, decoder included. `mode`: "steps" where the host drives the scales one by
    one; "cuda-graph" where the generation ran as one captured graph, or "stream" as one sequence that could not be
    captured: then `scales` is empty, `decode` is in `device`, the seconds of the whole on the device.
    """

    condition: float
    scales: tuple[ScaleTime, ...]
    decode: float
    total: float
    mode: str = "steps"
    device: float | None = None

    @property
    def sampling(self) -> float:
        return sum(scale.sample for scale in self.scales)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"sampling": self.sampling}


@dataclass(frozen=True)
class EditRecord:
    """What was edited: the options, and sha256 of the pixels of picture and mask."""

    edit: Edit
    picture_sha256: str
    mask_sha256: str | None

    def to_json(self) -> dict[str, Any]:
        return {**self.edit.to_json(), "picture_sha256": self.picture_sha256, "mask_sha256": self.mask_sha256}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EditRecord:
        """Raises InvalidInput, KeyError, TypeError."""
        options = dict(data)
        picture, mask = options.pop("picture_sha256"), options.pop("mask_sha256")
        return cls(Edit.from_json(options), str(picture), None if mask is None else str(mask))


@dataclass(frozen=True)
class Settings:
    """All that decides the tokens of one image, given its bundle and, for an edit, its picture."""

    bundle: str
    label: int
    seed: int
    index: int
    schedule: ScaleSchedule
    guidance: Guidance
    sampling: Sampling
    backend: str
    edit: EditRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """64-bit integers as text: JSON readers lose them otherwise."""
        edit = {} if self.edit is None else {"edit": self.edit.to_json()}
        return edit | {
            "version": SETTINGS_VERSION,
            "runtime": __version__,
            "bundle": self.bundle,
            "backend": self.backend,
            "class": self.label,
            "seed": str(self.seed),
            "index": str(self.index),
            "schedule": str(self.schedule),
            "guidance": self.guidance.to_json(),
            "sampling": self.sampling.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> Settings:
        """Read back what `to_json` wrote. Raises ArtifactRefused."""
        try:
            if data["version"] != SETTINGS_VERSION:
                raise ValueError(f"version {data['version']!r}")
            return cls(
                bundle=str(data["bundle"]),
                label=check_whole("class", data["class"], 0),
                seed=check_seed(_whole(data["seed"])),
                index=check_index(_whole(data["index"])),
                schedule=ScaleSchedule.parse(data["schedule"]),
                guidance=Guidance(**data["guidance"]),
                sampling=Sampling.from_json(data["sampling"]),
                backend=str(data["backend"]),
                edit=EditRecord.from_json(data["edit"]) if "edit" in data else None,
            )
        except (KeyError, TypeError, ValueError, FlexVARError) as error:
            reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactRefused(
                f"{where} with settings that cannot be used ({reason})",
                expected=f"settings of version {SETTINGS_VERSION}",
                fix="make the image again, or pass the options yourself",
            ) from error


def _whole(text: object) -> int:
    """Digits to a whole number, and nothing else that `int` would take."""
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= 20):
        raise ValueError(f"{text!r:.100} where digits should be")
    return int(text)


@dataclass(frozen=True)
class GenerationOutput:
    """images (B, H, W, 3) uint8; tokens: one (B, h, w) int32 per scale; decoded (B, 3, H, W) float32 as the decoder
    gave it, where it was asked for; one Settings an image; choice: of the schedule, where a deadline was given."""

    images: NDArray[np.uint8]
    tokens: tuple[NDArray[np.int32], ...]
    seed: int
    timings: Timings
    settings: tuple[Settings, ...]
    decoded: NDArray[np.float32] | None = None
    choice: Choice | None = None

    def to_pil(self) -> list[Image.Image]:
        return [Image.fromarray(image) for image in self.images]
