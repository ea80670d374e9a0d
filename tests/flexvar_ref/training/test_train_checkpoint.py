"""Training checkpoints that `write` did not write are skipped or refused before they fill the memory."""

from __future__ import annotations

import argparse
import datetime
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexvar_ref.errors import RunRefused
from flexvar_ref.training.checkpoint import read_latest, write

STATE: dict[str, Any] = {
    "step": 3,
    "config": "{}",
    "parts": {"network": {"weight": torch.ones(3)}},
    "optimizers": {"network": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.95)}]}},
    "average": {"weight": torch.ones(3)},
    "task": {},
    "means": {"sums": {}, "count": 0},
}


class ByteArray:
    def __reduce__(self) -> Any:
        return bytearray, (1 << 31,)


def _compress(path: Path) -> None:
    torch.save({"format": "flexvar-training/1", **STATE}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def _save(**changes: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({"format": "flexvar-training/1", **STATE, **changes}, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "compressed": _compress,
    "a byte array of 2 GB": _save(task=ByteArray()),
    "a class": _save(task=argparse.Namespace()),
    "a date": _save(means=datetime.date(2026, 1, 1)),
    "another step": _save(step="3"),
    "another part": _save(average=[1]),
    "another format": _save(format="flexvar-training/9"),
    "text": lambda path: path.write_text("[" * 100_000),
    "empty": lambda path: path.write_bytes(b""),
}


def test_a_state_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, STATE)
    state = read_latest(tmp_path, "{}")
    assert state is not None and state["optimizers"] == STATE["optimizers"]
    assert torch.equal(state["average"]["weight"], torch.ones(3))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_of_another_content_is_skipped_and_alone_refused(damage: str, tmp_path: Path) -> None:
    write(tmp_path, STATE)
    DAMAGE[damage](tmp_path / "step_00000009.pt")
    state = read_latest(tmp_path, "{}")
    assert state is not None and state["step"] == 3
    (tmp_path / "step_00000003.pt").unlink()
    with pytest.raises(RunRefused, match=r"step_00000009\.pt cannot be read"):
        read_latest(tmp_path, "{}")
