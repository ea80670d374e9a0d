"""The output of a generation, and the settings that make each image again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._version import __version__
from .checks import check_index, check_seed, check_whole, short
from .deadlines.choice import Choice
from .editing.options import EditRecord
from .errors import InvalidInput
from .files.parsing import refuse_failures
from .model.guidance import Guidance
from .model.sampling import Sampling
from .model.schedule import ScaleSchedule
from .request import Request

if TYPE_CHECKING:
    from PIL import Image

SETTINGS_VERSION = 1
_KEYS = frozenset(
    {"version", "runtime", "bundle", "backend", "class", "seed", "index", "schedule", "guidance", "sampling", "edit"}
)


@dataclass(frozen=True)
class ScaleTime:
    """Seconds of one scale (h, w): the transformer's step with its inputs, and sampling if the host does it."""

    size: tuple[int, int]
    step: float
    sample: float


@dataclass(frozen=True)
class Timings:
    """Seconds of one generation, all images together.

    condition: checks, and what is opened or allocated the first time; on a CPU also the condition of the classes.
    scales: in order. total: wall time with the decoder. mode: "steps" if the host ran the scales one by one,
    "cuda-graph" if the generation ran as one captured graph, "stream" if it was enqueued as a whole without a capture.
    In the last two, `scales` is empty, `decode` is 0, and `device` has the seconds of the whole generation on the
    device."""

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
class Settings:
    """Everything that determines the tokens of one image, besides its bundle and, for an edit, its picture."""

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
        """The settings that `to_json` wrote. where: name of the file, for errors. Raises ArtifactRefused."""
        problem, expected = f"{where} has settings that cannot be used", f"settings of version {SETTINGS_VERSION}"
        with refuse_failures(problem, expected=expected, fix="Make the image again, or pass the options yourself."):
            try:
                return cls._parsed(data)
            except InvalidInput as error:  # a value that is refused as an argument is not an argument here
                raise ValueError(error.got) from error

    @classmethod
    def _parsed(cls, data: dict[str, Any]) -> Settings:
        """Raises InvalidInput, TypeError, ValueError."""
        if wrong := (_KEYS ^ set(data)) - {"edit"}:
            raise ValueError(f"these keys are missing or unknown: {', '.join(map(short, sorted(wrong)[:5]))}")
        if data["version"] != SETTINGS_VERSION:
            raise ValueError(f"version {data['version']!r:.100}")
        return cls(
            bundle=_text("bundle", data["bundle"]),
            label=check_whole("class", data["class"], 0),
            seed=check_seed(_whole(data["seed"])),
            index=check_index(_whole(data["index"])),
            schedule=ScaleSchedule.parse(_text("schedule", data["schedule"])),
            guidance=Guidance(**data["guidance"]),
            sampling=Sampling.from_json(data["sampling"]),
            backend=_text("backend", data["backend"]),
            edit=EditRecord.from_json(data["edit"]) if "edit" in data else None,
        )


def _text(key: str, value: object) -> str:
    """A text of at most 1000 characters. Raises ValueError."""
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError(f"{key} is {short(value)}, but it must be text of at most 1000 characters")
    return value


def _whole(text: object) -> int:
    """A text of at most 20 digits as a whole number. Raises ValueError."""
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= 20):
        raise ValueError(f"{text!r:.100} is no text of digits")
    return int(text)


def settings_of(request: Request, bundle: str, backend: str) -> tuple[Settings, ...]:
    """The settings of every image of a request. bundle: its sha256."""
    return tuple(
        Settings(bundle, label, seed, index, request.schedule, guidance, request.sampling, backend)
        for label, seed, index, guidance in zip(
            request.labels, request.seeds, request.indices, request.guidance, strict=True
        )
    )


@dataclass(frozen=True)
class ScaleStep:
    """One generated scale: number `index` of `count`, its size (h, w), its tokens (B, h, w) and its time.

    `preview()` decodes it to (B, H, W, 3) uint8, because every scale is a whole image.
    """

    index: int
    count: int
    size: tuple[int, int]
    tokens: NDArray[np.int32]
    time: ScaleTime
    preview: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class GenerationOutput:
    """The images of one call.

    images: (B, H, W, 3) uint8. tokens: one (B, h, w) int32 for each scale. seed: the seed that was used, or a tuple if
    a list was given. settings: one for each image. decoded: (B, 3, H, W) float32 from the decoder, if it was asked for.
    choice: of the schedule, if a deadline was given."""

    images: NDArray[np.uint8]
    tokens: tuple[NDArray[np.int32], ...]
    seed: int | tuple[int, ...]
    timings: Timings
    settings: tuple[Settings, ...]
    decoded: NDArray[np.float32] | None = None
    choice: Choice | None = None

    def to_pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        from PIL import Image  # slow to import

        return [Image.fromarray(image) for image in self.images]
