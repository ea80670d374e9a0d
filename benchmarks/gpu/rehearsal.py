"""A rehearsal of both stages on a machine without a GPU, from a bare copy of the tracked files and a packed folder.

The tiny model in float16 takes the place of d16. The emulated device of the tests takes the place of the GPU, for our
kernels, for the backend `cuda` and for the proof. Fakes of the tests take the place of cuBLASLt and cuDNN. The backend
ort-cpu takes the place of ort-cuda. The step "tiny ort-cuda fp16" is started. It must fail, because there is no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .pack import tracked_files
from .plan import Phase
from .processes import DONE, FAILED
from .stages import PEER, PRECISION, SECONDS, rehearsal, stage_plan

REFUSED = f"tiny {PEER} {PRECISION}"
GRACE_SECONDS = 15.0  # after its limit, until a stage is killed
SCRIPT = "benchmarks/gpu_check.py"
NOTE_LETTERS = 160


@dataclass(frozen=True)
class Step:
    """The outcome of one phase of a rehearsal.

    limit, taken: seconds; taken is None where the phase did not run. note: why the phase is not done.
    """

    name: str
    limit: float
    taken: float | None
    state: str
    note: str

    @property
    def as_expected(self) -> bool:
        """Whether the phase ended within its limit, in the state that it has without a GPU."""
        expected = FAILED if self.name == REFUSED else DONE
        return self.state == expected and self.taken is not None and self.taken <= self.limit


@dataclass(frozen=True)
class StageRun:
    """The outcome of the process of a stage: the seconds it took, and its exit code, None where it was killed."""

    taken: float
    exit_code: int | None

    def as_expected(self, limit: float) -> bool:
        """Whether the stage ended by itself, within `limit` seconds and without an error."""
        return self.exit_code == 0 and self.taken <= limit


def rehearse(root: Path, out: Path) -> int:
    """Pack, copy the checkout and run both stages. Returns 0 if every step went as expected, else 1.

    root: folder of the checkout. Results of an earlier rehearsal in `out` are deleted first.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stage in SECONDS:
        _result(out, stage).unlink(missing_ok=True)
    console, right = Console(width=None if sys.stdout.isatty() else 140), True
    with tempfile.TemporaryDirectory(prefix="gpu-rehearsal-") as temporary:
        folder = Path(temporary)
        checkout, pack = folder / "checkout", folder / "pack"
        copy_tracked(root, checkout)
        packing = [sys.executable, str(root / SCRIPT), "--pack", str(pack), "--tiny"]
        if subprocess.run(packing, check=False).returncode:
            return 1
        for stage, seconds in SECONDS.items():
            ran = run_stage(stage, seconds, checkout, pack, folder / "work", out)
            steps = steps_of(stage_plan(stage, rehearsal(pack)), _records(_result(out, stage)))
            show(console, stage, steps, seconds, ran)
            right &= ran.as_expected(seconds) and all(step.as_expected for step in steps)
    console.print("The rehearsal went well." if right else "The rehearsal FAILED: see the steps marked with !.")
    return 0 if right else 1


def copy_tracked(root: Path, target: Path) -> None:
    """Copy the tracked files, as they travel: without the history, and without files that git does not track."""
    for name in tracked_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name, follow_symlinks=False)


def steps_of(plan: list[Phase], records: dict[str, Any]) -> list[Step]:
    """The outcome of each phase of the plan, by the records of a result file."""
    found = []
    for phase in plan:
        record = records.get(phase.name, {"status": "missing", "seconds": None, "reason": None})
        taken = 0.0 if record["status"] == DONE and record["seconds"] is None else record["seconds"]
        found.append(Step(phase.name, phase.limit, taken, record["status"], record["reason"] or ""))
    return found


def show(console: Console, stage: str, steps: list[Step], seconds: float, ran: StageRun) -> None:
    """Print a table of the steps of a stage. seconds: the limit of the whole stage."""
    table = Table("step", "limit s", "taken s", "state", "note", title=f"Stage {stage}, rehearsed")
    for step in steps:
        state = step.state if step.as_expected else f"{step.state} !"
        taken = "–" if step.taken is None else f"{step.taken:.1f}"
        table.add_row(step.name, f"{step.limit:.0f}", taken, state, step.note[:NOTE_LETTERS])
    table.add_section()
    state = "in time" if ran.taken <= seconds else "too long !"
    ended = "killed" if ran.exit_code is None else f"exit code {ran.exit_code}"
    table.add_row("all", f"{seconds:.0f}", f"{ran.taken:.1f}", state, ended if ran.exit_code == 0 else f"{ended} !")
    console.print(table)


def run_stage(stage: str, seconds: float, checkout: Path, pack: Path, work: Path, out: Path) -> StageRun:
    """Run a stage from the copied checkout, with only the copy on the import path.

    It is killed 15 seconds after its limit of `seconds`.
    """
    command = [sys.executable, str(checkout / SCRIPT), "--stage", stage, "--tiny", "--carried", str(pack)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began, exit_code = time.monotonic(), None
    with suppress(subprocess.TimeoutExpired):  # a stage that hangs still gets its table
        done = subprocess.run(
            [*command, "--work", str(work), "--out", str(out.resolve())],
            cwd=checkout,
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=seconds + GRACE_SECONDS,
            check=False,
        )
        exit_code = done.returncode
    return StageRun(time.monotonic() - began, exit_code)


def _result(out: Path, stage: str) -> Path:
    return out / f"gpu_check_{stage}.json"


def _records(result: Path) -> dict[str, Any]:
    try:
        records: dict[str, Any] = json.loads(result.read_text())["phases"]
        return records
    except (OSError, ValueError, KeyError):
        return {}
