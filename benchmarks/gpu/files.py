"""The files of a run: the places of its models in the work folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.files.atomic import atomic_write

Save = Callable[[dict[str, Any]], None]
"""Saves all that a phase has found so far."""


def carried_folder(precision: str) -> str:
    """The folder of the tiny model's bundle that travels whole, in the packed folder and in that of a run."""
    return f"tiny-{precision}"


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model lie in the folder of a run.

    bundle: the bundle. in_phases: the same bundle with a decoder in phases. proof: every row of logits of the
    reference. stamp: the hash of the sources that made the other three.
    """

    bundle: Path
    in_phases: Path
    proof: Path
    stamp: Path

    @classmethod
    def of(cls, work: Path, model: str) -> ModelFiles:
        names = (f"{model}.bundle", f"{model}.phases.bundle", f"{model}.proof.npz", f"{model}.sources")
        return cls(*(work / name for name in names))

    @property
    def exist(self) -> bool:
        """Whether the bundle and its proof are there, from whichever sources."""
        return self.bundle.exists() and self.proof.exists()

    def made_by(self, sources: str) -> bool:
        """Whether the stamp names these sources. sources: their hash."""
        return self.stamp.is_file() and self.stamp.read_text().strip() == sources

    def keep_only(self, sources: str) -> None:
        """Delete files that other sources made, print one line about it, and stamp what will be made with `sources`."""
        if self.made_by(sources):
            return
        old = [path for path in (self.bundle, self.in_phases, self.proof) if path.exists()]
        if old:
            print(f"{self.bundle}: was made by other sources, so it is made again.", flush=True)
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with atomic_write(self.stamp, force=True) as temporary:
            temporary.write_text(f"{sources}\n")
