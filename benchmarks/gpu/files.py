"""The files of a run: where the models lie in its folder, and what its phases write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Save = Callable[[dict[str, Any]], None]
"""What a phase calls with all that it has found so far."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies in the folder of a run: its bundle, the same with a decoder in phases, and its proof with
    every row of logits."""

    bundle: Path
    in_phases: Path
    proof: Path

    @classmethod
    def of(cls, work: Path, model: str) -> ModelFiles:
        return cls(work / f"{model}.bundle", work / f"{model}.phases.bundle", work / f"{model}.proof.npz")

    @property
    def exist(self) -> bool:
        """Whether an earlier run left the bundle and its proof."""
        return self.bundle.exists() and self.proof.exists()
