"""The state of a training run on disk: written whole or not at all, the last two kept.

Every random draw is a function of (seed, step, chunk) (`randomness`), so weights, optimisers, averages, the task's
own state and the step are all that a resume to the bit needs.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from .errors import RunRefused

log = logging.getLogger(__name__)

FORMAT = "flexvar-training/1"
KEPT = 2
KEYS = ("format", "step", "config", "parts", "optimizers", "average", "task", "means")
_NAME = re.compile(r"step_([0-9]{8,})\.pt")


def write(folder: Path, state: dict[str, Any]) -> Path:
    """Write `step_N.pt` through a temporary file, then remove all but the last two. A kill at any moment leaves one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(folder)
    for old in found(folder)[:-KEPT]:
        old.unlink()
    return path


def found(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in names if _NAME.fullmatch(path.name)), key=lambda path: int(path.stem[5:]))


def read_latest(folder: Path, config: str) -> dict[str, Any] | None:
    """The newest state that can be read, or None where there is none yet.

    config: what the run was started with, as text. Raises RunRefused where no file can be read, or where the state
    belongs to another configuration.
    """
    paths, reason = found(folder), ""
    for path in reversed(paths):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) != set(KEYS):
                raise ValueError(f"it is no state of format {FORMAT}")
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            log.warning("%s cannot be read (%s)", path, reason)
            continue
        if state["config"] != config:
            raise RunRefused(
                f"{path.name} of another configuration",
                expected="the configuration the run was started with",
                fix="pass the same --config, --data and options, or start another run with another --out",
            )
        return state
    if paths:
        raise RunRefused(
            f"{len(paths)} checkpoints in {folder}, the newest unreadable ({reason:.200})",
            expected="at least one that can be read",
            fix="remove the folder and train again",
        )
    return None


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
