"""Both stages without a GPU, as they run on a GPU machine: from a bare copy of the tracked files and a packed folder.

The tiny model in float32 takes the place of d16, the backend ort-cpu that of ort-cuda, and the emulated device of the
tests that of the GPU, for our kernels and for the proof. The phase "tiny ort-cuda" is reached and refused.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .pack import tracked_files
from .plan import Phase
from .runner import DONE, FAILED
from .stages import BACKEND, SECONDS, rehearsal, stage_plan

REFUSED = f"tiny {BACKEND}"
GRACE_SECONDS = 15.0  # beyond its limit, after which a stage is killed
SCRIPT = "benchmarks/gpu_check.py"
NOTE_LETTERS = 160


@dataclass(frozen=True)
class Step:
    """A phase of a rehearsal: seconds that it took, None where it did not run; note: why it is not done."""

    name: str
    limit: float
    taken: float | None
    state: str
    note: str

    @property
    def as_expected(self) -> bool:
        """Whether it ended within its limit, in the state that it has without a GPU."""
        expected = FAILED if self.name == REFUSED else DONE
        return self.state == expected and self.taken is not None and self.taken <= self.limit


def rehearse(root: Path, out: Path) -> int:
    """Pack, copy, run and judge; 0 where every step is as it should be. root: of the checkout."""
    out.mkdir(parents=True, exist_ok=True)
    console, right = Console(width=None if sys.stdout.isatty() else 140), True
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as temporary:
        folder = Path(temporary)
        checkout, pack = folder / "checkout", folder / "pack"
        copy_tracked(root, checkout)
        packing = [sys.executable, str(root / SCRIPT), "--pack", str(pack), "--tiny"]
        if subprocess.run(packing, check=False).returncode:
            return 1
        for stage, seconds in SECONDS.items():
            taken = _run(stage, seconds, checkout, pack, folder / "work", out)
            steps = steps_of(stage_plan(stage, rehearsal(pack)), _records(out / f"gpu_check_{stage}.json"))
            show(console, stage, steps, seconds, taken)
            right &= taken <= seconds and all(step.as_expected for step in steps)
    console.print("The rehearsal went well." if right else "The rehearsal FAILED: see the steps marked with !.")
    return 0 if right else 1


def copy_tracked(root: Path, target: Path) -> None:
    """As they travel: without the history, and without what git does not track."""
    for name in tracked_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)


def steps_of(plan: list[Phase], records: dict[str, Any]) -> list[Step]:
    """Each phase of the plan with what became of it."""
    found = []
    for phase in plan:
        record = records.get(phase.name, {"status": "missing", "seconds": None, "reason": None})
        taken = 0.0 if record["status"] == DONE and record["seconds"] is None else record["seconds"]
        found.append(Step(phase.name, phase.limit, taken, record["status"], record["reason"] or ""))
    return found


def show(console: Console, stage: str, steps: list[Step], seconds: float, taken: float) -> None:
    table = Table("step", "limit s", "taken s", "state", "note", title=f"Stage {stage}, rehearsed")
    for step in steps:
        state = step.state if step.as_expected else f"{step.state} !"
        ran = "–" if step.taken is None else f"{step.taken:.1f}"
        table.add_row(step.name, f"{step.limit:.0f}", ran, state, step.note[:NOTE_LETTERS])
    table.add_section()
    table.add_row("all", f"{seconds:.0f}", f"{taken:.1f}", "in time" if taken <= seconds else "too long !", "")
    console.print(table)


def _run(stage: str, seconds: float, checkout: Path, pack: Path, work: Path, out: Path) -> float:
    """Seconds by this process's clock. Nothing of ours is on the path but the copy."""
    command = [sys.executable, str(checkout / SCRIPT), "--stage", stage, "--tiny", "--carried", str(pack)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.monotonic()
    subprocess.run(
        [*command, "--work", str(work), "--out", str(out.resolve())],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        timeout=seconds + GRACE_SECONDS,
        check=False,
    )
    return time.monotonic() - began


def _records(result: Path) -> dict[str, Any]:
    try:
        records: dict[str, Any] = json.loads(result.read_text())["phases"]
        return records
    except (OSError, ValueError, KeyError):
        return {}
