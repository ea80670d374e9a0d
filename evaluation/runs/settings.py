"""The settings of a run: everything that determines its images, and what is kept of them. They are in `run.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import decode, encode, loads
from flexvar_runtime.output import Settings

from .shards import Arrays, Sharding

FILE = "run.json"
SHARDS, PICTURES = "shards", "images"
POOL, SPATIAL, PIXELS = "pool", "spatial", "images"
"""Names of the arrays of a shard: features (n, D) and (n, S) float32, and pixels (n, H, W, 3) uint8."""
PUBLISHED_COUNT = 50_000
"""Images of published results."""
_FORMAT = 1
_FIX = "Pass a directory that flexvar evaluate sample made."


@dataclass(frozen=True, kw_only=True)
class KeptFeatures:
    """The features that a run keeps. network: identity of the network. pool, spatial: how many numbers an image has."""

    network: str
    pool: int
    spatial: int


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Image i has class i mod `classes` and draws from stream (seed, i). It depends on nothing else in the run.

    first: the settings of image 0. size: (height, width) in pixels. batch, device: images generated at once, and the
    name of the GPU. None on a CPU, where an image does not depend on them. pixels: whether shards hold the pixels. png:
    whether the run has a PNG file of each image.
    """

    first: Settings
    count: int
    classes: int
    size: tuple[int, int]
    shard_size: int
    batch: int | None
    device: str | None
    features: KeptFeatures | None
    pixels: bool
    png: bool

    @property
    def sharding(self) -> Sharding:
        return Sharding(self.count, self.shard_size)

    @property
    def arrays(self) -> Arrays:
        """The arrays of a shard."""
        kept = self.features
        arrays: Arrays = {} if kept is None else {POOL: ("float32", (kept.pool,))}
        if kept is not None and kept.spatial:
            arrays[SPATIAL] = "float32", (kept.spatial,)
        return arrays | ({PIXELS: ("uint8", (*self.size, 3))} if self.pixels else {})

    @property
    def digest(self) -> str:
        """A hash of everything that determines the shards. The version of the runtime is not part of it."""
        data = self.to_json()
        del data["image_0"]["runtime"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def label(self, number: int) -> int:
        return number % self.classes

    @property
    def bytes_of_pixels(self) -> int:
        """Bytes of the pixels of one image."""
        return self.size[0] * self.size[1] * 3

    def bytes_per_image(self) -> int:
        """Disk that an image takes in the shards and as PNG, at most."""
        raw = self.bytes_of_pixels
        kept = 0 if self.features is None else 4 * (self.features.pool + self.features.spatial)
        return kept + raw * self.pixels + (raw + 4096) * self.png

    def to_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "image_0": self.first.to_json(),
            "count": self.count,
            "classes": self.classes,
            "size": list(self.size),
            "shard_size": self.shard_size,
            "batch": self.batch,
            "device": self.device,
            "features": None if self.features is None else encode(self.features),
            "pixels": self.pixels,
            "png": self.png,
        }


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The form of `run.json`, except image 0, which `Settings.from_json` checks."""

    format: int
    count: int
    classes: int
    size: tuple[int, int]
    shard_size: int
    batch: int | None
    device: str | None
    features: KeptFeatures | None
    pixels: bool
    png: bool


def is_run(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_settings(folder: Path) -> RunSettings:
    """The settings of a run. Raises ArtifactRefused."""
    path = folder / FILE
    data = loads(read_small(path, fix=_FIX), where=str(path), fix=_FIX)
    if not isinstance(data, dict) or not isinstance(data.get("image_0"), dict) or data.get("format") != _FORMAT:
        got = f"{path} is not the description of a run in format {_FORMAT}."
        raise ArtifactRefused(got, expected=f"a run in format {_FORMAT}", fix=_FIX)
    first = Settings.from_json(data.pop("image_0"), str(path))
    stored = decode(_Stored, data, where=str(path), fix=_FIX)
    if min(stored.count, stored.classes, stored.shard_size, *stored.size) < 1:
        raise ArtifactRefused(f"{path} has a number below 1.", expected="numbers from 1 on", fix=_FIX)
    if (first.label, first.index) != (0, 0):
        raise ArtifactRefused(f"image_0 in {path} is not image 0.", expected="class 0 and index 0", fix=_FIX)
    with refuse_failures(f"{path} cannot be used", expected="a run of fewer images", fix=_FIX):
        Sharding(stored.count, stored.shard_size).check()
    values = {name: value for name, value in vars(stored).items() if name != "format"}
    return RunSettings(first=first, **values)


def begin_or_resume(folder: Path, settings: RunSettings) -> None:
    """Write the settings of a new run, or check that an existing run has the same ones.

    Raises InvalidInput if they differ or if the folder holds other files, ArtifactRefused if they cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        foreign = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        if foreign and not path.is_file():  # another process may have begun the run meanwhile
            got = f"{folder} has other files in it, so no run can be begun there."
            raise InvalidInput(got, expected="a new or empty directory", fix="Choose another directory.")
        try:
            with atomic_write(path) as partial:
                _write(partial, settings)
            return
        except InvalidInput:  # another process was faster
            if not path.is_file():
                raise
    begun = read_settings(folder)
    if begun.digest == settings.digest:
        return
    shards = folder / SHARDS
    if not shards.is_dir() or not any(shards.iterdir()):  # nothing was made with the other settings
        with atomic_write(path, force=True) as partial:
            _write(partial, settings)
        return
    raise _other_settings(folder, begun, settings)


_OPTIONS = {
    "image_0.bundle": "BUNDLE",
    "image_0.backend": "--backend",
    "image_0.seed": "--seed",
    "image_0.schedule": "--schedule",
    "image_0.guidance": "--cfg, --guidance or --max-side",
    "image_0.sampling": "--top-k, --top-p, --greedy-scales or --max-side",
    "count": "--count",
    "classes": "BUNDLE",
    "size": "--schedule",
    "shard_size": "--shard-size",
    "batch": "--batch-size",
    "device": "--device",
    "features": "--network",
    "pixels": "--network or --npz",
    "png": "--png",
}


def _write(path: Path, settings: RunSettings) -> None:
    path.write_text(json.dumps(settings.to_json(), indent=1) + "\n", encoding="utf-8")


def _other_settings(folder: Path, begun: RunSettings, now: RunSettings) -> InvalidInput:
    one, other = _flat(begun), _flat(now)
    key = next(key for key in _OPTIONS if one[key] != other[key])
    option = _OPTIONS[key]
    return InvalidInput(
        f"{folder} was begun with other settings. Its {option} gave {_shown(key, one, other)}, and now gives "
        f"{_shown(key, other, one)}.",
        expected="the settings of the run",
        fix=f"Pass the same {option} as before, or choose another directory.",
    )


def _flat(settings: RunSettings) -> dict[str, Any]:
    data = settings.to_json()
    return data | {f"image_0.{key}": value for key, value in data["image_0"].items()}


def _shown(key: str, one: dict[str, Any], other: dict[str, Any]) -> str:
    """One of two different values, as text. Of objects only what differs."""
    value, second = one[key], other[key]
    if key == "pixels":
        return "pixels" if value else "no pixels"
    if key == "features":
        return "no features" if value is None else f"features of {value['network']}"
    if isinstance(value, dict) and isinstance(second, dict):
        value = {name: part for name, part in value.items() if part != second.get(name)}
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
