"""Shards: files of a folder that together hold the features or pixels of many images. Each is complete or not there.

A shard is an `.npz` file. Its array `identity` says which work, which shard and which images it belongs to, so that a
file that was copied, renamed or made by other work is found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.npz import NpzFile, open_npz
from flexvar_runtime.files.strict_json import decode, loads

from .claims import SUFFIX as CLAIM

SUFFIX = ".npz"
_IDENTITY = "identity"
_NAME = re.compile(r"([0-9]{6})\.npz")
_CLAIM_NAME = re.compile(r"[0-9]{6}\.claim")
_SHOWN = 5  # names in a message
_FIX = "Delete it, then run the same command again."


_MOST_SHARDS = 10**6  # names have six digits

Arrays = dict[str, tuple[str, tuple[int, ...]]]
"""Type and shape of a row of each array of a shard, by name."""


@dataclass(frozen=True)
class Sharding:
    """`count` images in shards of `size`. The last one may be smaller."""

    count: int
    size: int

    def check(self) -> None:
        """Raise InvalidInput if there are more shards than names."""
        if self.shards > _MOST_SHARDS:
            got = f"{self.count:,} images in shards of {self.size:,} are more than {_MOST_SHARDS:,} shards."
            raise InvalidInput(got, expected=f"at most {_MOST_SHARDS:,} shards", fix="Pass a larger --shard-size.")

    @property
    def shards(self) -> int:
        return -(-self.count // self.size)

    def images(self, shard: int) -> range:
        """The numbers of the images in a shard."""
        return range(shard * self.size, min(self.count, (shard + 1) * self.size))


@dataclass(frozen=True)
class ShardIdentity:
    """What a shard says of itself. work: hash of the settings that made it. first, count: its images."""

    work: str
    shard: int
    first: int
    count: int


class ShardFolder:
    """The shards of one piece of work. work: hash of the settings that determine their content."""

    def __init__(self, folder: Path, work: str, sharding: Sharding, arrays: Arrays) -> None:
        self.folder, self.work, self.sharding, self.arrays = folder, work, sharding, arrays

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}{SUFFIX}"

    def claim(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}{CLAIM}"

    def has(self, shard: int) -> bool:
        return self.path(shard).is_file()

    def done(self) -> list[int]:
        """Numbers of the shards that exist, in order. Raises ArtifactRefused if the folder holds a foreign file."""
        found = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) < self.sharding.shards and path.is_file():
                found.append(int(match[1]))
            elif not path.name.startswith(".") and _CLAIM_NAME.fullmatch(path.name) is None:
                raise ArtifactRefused(
                    f"{path} is not a shard of this run, which has {self.sharding.shards} shards.",
                    expected="no other files than shards",
                    fix="Move it elsewhere.",
                )
        return found

    def missing(self) -> list[int]:
        done = set(self.done())
        return [shard for shard in range(self.sharding.shards) if shard not in done]

    def require_complete(self, partial: bool) -> list[int]:
        """The shards that exist. Raises InvalidInput if one is missing, unless `partial`."""
        done, missing = self.done(), self.missing()
        if missing and not partial:
            images = sum(len(self.sharding.images(shard)) for shard in missing)
            names = ", ".join(self.path(shard).name for shard in missing[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise InvalidInput(
                f"{images:,} of {self.sharding.count:,} images are missing in {self.folder} ({names}{more}).",
                expected="all images",
                fix="Run flexvar evaluate sample again (with --shard 0/1 if it made a share), or pass --partial.",
            )
        return done

    def write(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a shard atomically. If another process has written it meanwhile, the bytes are the same."""
        images = self.sharding.images(shard)
        identity = {"work": self.work, "shard": shard, "first": images.start, "count": len(images)}
        text = json.dumps(identity, sort_keys=True).encode()
        with atomic_write(self.path(shard), force=True) as partial, partial.open("wb") as file:
            stored = {_IDENTITY: np.frombuffer(text, np.uint8), **arrays}
            np.savez(file, **stored)  # type: ignore[arg-type]  # typed as if a name could be that of an option

    def check(self, shard: int) -> None:
        """Raise ArtifactRefused unless a shard says that it is this one, without reading the rest of it."""
        with self._open(shard):
            pass

    def read(self, shard: int, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Arrays of a shard. Raises ArtifactRefused if it is damaged, or is not this shard."""
        count = len(self.sharding.images(shard))
        with self._open(shard) as stored:
            for name in names:
                info, (dtype, row) = stored.infos.get(name), self.arrays[name]
                if info is None or (info.dtype, info.shape) != (dtype, (count, *row)):
                    raise ValueError(f"its array {name} is {info or 'missing'}, but it must be {dtype} {(count, *row)}")
            return {name: stored.read(name) for name in names}

    @contextmanager
    def _open(self, shard: int) -> Iterator[NpzFile]:
        path = self.path(shard)
        with open_npz(path, str(path), expected="a complete shard", fix=_FIX) as stored:
            self._require_identity(stored, shard)
            yield stored

    def _require_identity(self, stored: NpzFile, shard: int) -> None:
        name, images = str(self.path(shard)), self.sharding.images(shard)
        if _IDENTITY not in stored.infos:
            raise ArtifactRefused(f"{name} is not a shard.", expected="a shard", fix=_FIX)
        text = stored.read(_IDENTITY).tobytes()
        found = decode(ShardIdentity, loads(text, where=name, fix=_FIX), where=name, fix=_FIX)
        if found.work != self.work:
            got = f"{name} is a shard of another run."
        elif found.shard != shard:
            got = f"{name} is a copy of shard {found.shard:06d}, not shard {shard:06d}."
        elif (found.first, found.count) != (images.start, len(images)):
            got = f"{name} has {found.count} images from {found.first}, not {len(images)} from {images.start}."
        else:
            return
        raise ArtifactRefused(got, expected=f"shard {shard:06d} of this run", fix=_FIX)
