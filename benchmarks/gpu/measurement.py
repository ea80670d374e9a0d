"""Carries out a plan: runs its phases, writes the result after each change, and shows it at the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from flexvar_runtime import __version__

from .plan import Phase
from .processes import CHILD, Record, Runner
from .result_file import ResultFile
from .rows_and_goals import document, headline, show

CUDA_PROBE = """
import cuda.core
from cuda.bindings import nvrtc
nvrtc.nvrtcVersion()
print(cuda.core.__version__)
"""
RESERVE_SECONDS = 6.0  # for the last process to end and the table to be printed


@dataclass(frozen=True)
class Clock:
    """The time when the command began, by `time.monotonic`, and the seconds that it may take."""

    started: float
    seconds: float

    @property
    def deadline(self) -> float:
        """When the last phase is stopped."""
        return self.started + self.seconds - RESERVE_SECONDS

    @property
    def taken(self) -> float:
        return time.monotonic() - self.started


@dataclass(frozen=True)
class RunSetup:
    """Files, environment and recorded facts of a run.

    result: the result file. work: the folder for bundles. environment: variables of the phases. model: the model that
    the goals are for. options: recorded in the result. source_sha256: hash of our source files. command: how a phase
    is started.
    """

    result: Path
    work: Path
    environment: Mapping[str, str]
    model: str
    options: Mapping[str, str]
    source_sha256: str
    command: Sequence[str] = CHILD


def measure(
    plan: Sequence[Phase], setup: RunSetup, clock: Clock, made: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Run a plan and show its result. The result file is complete JSON whenever this process ends.

    made: results of phases that need not run.
    """
    missing, file = _warn_without_cuda(), ResultFile(setup.result, setup.options)
    facts: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": dict(setup.options),
        "version": __version__,
        "source_sha256": setup.source_sha256,
        "model": setup.model,
        "missing": missing,
    }
    seen = set[str]()

    def result(records: dict[str, Record]) -> dict[str, Any]:
        as_json = {name: record.to_json() for name, record in records.items()}
        return document(facts | {"minutes_taken": round(clock.taken / 60, 2)}, as_json, setup.model)

    def report(records: dict[str, Record]) -> None:
        file.write(result(records))
        for name, record in records.items():
            if record.seconds is not None and name not in seen:
                seen.add(name)
                print(f"{clock.taken:6.1f} s  {name}: {record.status}, {record.seconds:.1f} s", flush=True)

    runner = Runner(plan, setup.work, clock.deadline, setup.environment, report, setup.command, made)
    final = file.write(result(runner.run()))
    show(final, Console(width=None if sys.stdout.isatty() else 140))
    print(json.dumps(headline(final)), flush=True)


def _warn_without_cuda() -> str | None:
    missing = without_cuda()
    if missing:
        print(
            f"gpu_check: Our kernels cannot run here: {missing}. Only the peers in torch will be measured on a GPU. "
            "Install what is missing: pip install 'cuda-python>=13' 'nvidia-cuda-nvrtc>=13'",
            file=sys.stderr,
            flush=True,
        )
    return missing


def without_cuda() -> str | None:
    """The reason why our kernels cannot run without cuda.core and NVRTC, or None where both are there.

    They are loaded in another process, because a broken library may end it.
    """
    from flexvar_runtime.cuda.gpu import MINIMUM

    try:
        done = subprocess.run([sys.executable, "-c", CUDA_PROBE], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "cuda.core or NVRTC does not load within 20 s"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return f"no cuda.core with NVRTC ({reason:.200})"
    version = done.stdout.strip()
    old = tuple(int(part) for part in re.findall("[0-9]+", version)[:2]) < MINIMUM
    return f"cuda.core {version}, older than {'.'.join(map(str, MINIMUM))}" if old else None


def environment(work: Path, folders: Sequence[Path]) -> dict[str, str]:
    """The environment variables of the phases.

    Python imports from `folders` first. Receipts and caches lie in `work`, so that those of the user stay untouched.
    """
    path = [*map(str, folders), *(part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part)]
    own = {
        "XDG_STATE_HOME": "state",
        "XDG_CACHE_HOME": "cache",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
    }
    return {
        **os.environ,
        **{name: str(work / folder) for name, folder in own.items()},
        "PYTHONPATH": os.pathsep.join(path),
    }


@contextmanager
def work_folder(folder: Path | None, precision: str) -> Iterator[Path]:
    """The folder for bundles of a precision: below `folder`, which is kept, or a temporary one without `folder`."""
    if folder is not None:
        (folder / precision).mkdir(parents=True, exist_ok=True)
        yield (folder / precision).resolve()
        return
    temporary = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
