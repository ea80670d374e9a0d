"""Training checkpoints. Each is written completely or not at all, and the last two are kept.

Every random draw is a function of (seed, step, chunk), see `randomness`. So a bit-exact resume needs only the weights,
the optimisers, the averages, the task's own state and the step.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import RunRefused
from ..files import write_whole
from ..parsing import refuse_failures, shown
from ..pth import read_pth

log = logging.getLogger(__name__)

FORMAT = "flexvar-training/1"
KEPT = 2
KEYS = ("format", "step", "config", "parts", "optimizers", "average", "task", "means")
_NAME = re.compile(r"step_([0-9]{8,})\.pt")


def write(folder: Path, state: dict[str, Any]) -> Path:
    """Write `step_N.pt` through a temporary file, then delete all but the last two. Returns its path.

    A process that is killed at any moment leaves a complete checkpoint, if there was one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    with write_whole(path) as partial:
        torch.save({"format": FORMAT, **state}, partial)
    for old in find_checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    names = folder.iterdir() if os.path.isdir(folder) else ()
    return sorted((path for path in names if _NAME.fullmatch(path.name)), key=lambda path: int(path.stem[5:]))


def read_latest(folder: Path, config: str) -> dict[str, Any] | None:
    """The newest state that can be read, or None if there is no checkpoint yet.

    config: the configuration of the run, as text. Raises RunRefused if there are checkpoints but none can be read, or
    if the state belongs to another configuration.
    """
    paths, reason = find_checkpoints(folder), ""
    for path in reversed(paths):
        try:
            state = _read(path)
        except RunRefused as error:
            reason = error.got
            log.warning("%s The checkpoint is skipped.", reason)
            continue
        if state["config"] != config:
            raise RunRefused(
                f"{path} was written by a run with another configuration.",
                expected="the configuration the run was started with",
                fix="Pass the same --config, --data and options, or start a new run in another --out.",
            )
        return state
    if paths:
        raise RunRefused(
            f"None of the {len(paths)} checkpoints in {folder} can be read. {reason}",
            expected="at least one that can be read",
            fix="Delete the folder and train again.",
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises RunRefused for a file that `write` did not write."""
    with refuse_failures(RunRefused, f"{path} cannot be read", expected="a training state", fix="Delete it."):
        read_pth(path, _refuse_call)  # checks the archive, so that torch.load allocates no more than the file holds
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT or set(state) != set(KEYS):
            raise ValueError(f"it is not a training state of format {FORMAT}")
        types = (("step", int), ("config", str), *((key, dict) for key in KEYS[3:]))
        wrong = [key for key, kind in types if type(state[key]) is not kind]
        if wrong or state["step"] < 0:
            raise ValueError(f"its {', '.join(wrong) or 'step'} has no value of a training state")
        return state


def _refuse_call(name: str) -> None:
    raise ValueError(f"it asks for {shown(name)}, which training states do not hold")
