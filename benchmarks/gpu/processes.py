"""Runs phases as processes: starts them in order, stops them at their limits, and keeps their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .plan import Phase

CHILD = (sys.executable, "-m", "flexvar_bench.gpu.child")
POLL_SECONDS = 0.05
GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL
TAIL = 2000  # characters kept of the stderr of a failed phase
LEAST_SHARE = 0.5  # a phase is started if so much of its expected duration is left

DONE, FAILED, STOPPED, NOT_MEASURED, RUNNING = "done", "failed", "stopped", "not measured", "running"


@dataclass(frozen=True)
class Record:
    """The outcome of a phase.

    result: what it last wrote, complete or partial. reason: why it is not done, in one line. stderr: the end of its
    standard error, if it is not done. The status "running" stays only if the whole run was killed.
    """

    status: str
    reason: str | None = None
    started: str | None = None
    seconds: float | None = None
    result: dict[str, Any] | None = None
    stderr: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def not_measured(reason: str) -> Record:
    return Record(NOT_MEASURED, f"not measured: {reason}")


@dataclass
class _Running:
    phase: Phase
    process: subprocess.Popen[bytes]
    began: float
    stop_at: float
    started: str
    folder: Path
    written: int = 0  # when its result was last changed, in nanoseconds


class Runner:
    """Runs phases until all have ended or the deadline comes.

    `report` is called with all records when a phase begins, when it has a new result, and when it ends.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        work: Path,
        deadline: float,
        environment: Mapping[str, str],
        report: Callable[[dict[str, Record]], None],
        command: Sequence[str] = CHILD,
        made: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        """deadline: of the clock `time.monotonic`. command: how a phase is started, without its job and options. made:
        results of phases that need not run, by name."""
        self._work, self._deadline, self._environment = work, deadline, dict(environment)
        self._report, self._command = report, tuple(command)
        made = made or {}
        self._waiting = [phase for phase in phases if phase.name not in made]
        self._running: list[_Running] = []
        self.records = {
            phase.name: Record(DONE, result=made[phase.name]) if phase.name in made else not_measured("not reached")
            for phase in phases
        }

    def run(self) -> dict[str, Record]:
        """Records of all phases, in their order."""
        try:
            self._report(self.records)
            while self._waiting or self._running:
                self._start_ready_phases()
                self._collect()
                time.sleep(POLL_SECONDS if self._running else 0)
        finally:
            for running in self._running:  # signal all before waiting for the first
                _signal(running.process, signal.SIGTERM)
            for running in list(self._running):
                _end(running.process)
                self._running.remove(running)
                self._finish(running, Record(STOPPED, "the run was interrupted"))
        return self.records

    def _start_ready_phases(self) -> None:
        """Start phases in their order. A ready phase that must run alone holds back those behind it."""
        for phase in list(self._waiting):
            missing = self._why_not_runnable(phase)
            if missing:
                self._waiting.remove(phase)
                self._record(phase, not_measured(missing))
            elif any(need in self.records and self.records[need].status != DONE for need in phase.needs):
                continue
            elif self._running and (phase.alone or any(running.phase.alone for running in self._running)):
                return
            else:
                self._waiting.remove(phase)
                self._start(phase)
                if phase.alone:
                    return

    def _why_not_runnable(self, phase: Phase) -> str | None:
        """Why a phase cannot run any more: a phase that it needs is not done, or too little time is left."""
        for need in phase.needs:
            record, pending = self.records.get(need), {p.name for p in self._waiting} | self._active()
            if need not in pending and (record is None or record.status != DONE):
                return f"it needs {need!r}, which {f'is {record.status}' if record else 'was left out'}"
        left = self._deadline - time.monotonic()
        if left < LEAST_SHARE * phase.seconds:
            return f"{max(left, 0):.0f} s were left, and it takes about {phase.seconds:.0f} s"
        return None

    def _active(self) -> set[str]:
        return {running.phase.name for running in self._running}

    def _start(self, phase: Phase) -> None:
        folder = self._work / "phases" / phase.name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)  # of an earlier run in the same folder
        options = json.dumps(phase.options)
        arguments = (phase.job, "--work", self._work, "--result", folder / "result.json", "--options", options)
        with (folder / "stderr").open("wb") as errors, (folder / "stdout").open("wb") as output:
            process = subprocess.Popen(
                [*self._command, *map(str, arguments)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,  # so that its children can be ended with it
            )
        began = time.monotonic()
        started = datetime.now(UTC).isoformat(timespec="seconds")
        stop_at = min(began + phase.limit, self._deadline)
        self._running.append(_Running(phase, process, began, stop_at, started, folder))
        self._record(phase, Record(RUNNING, RUNNING, started))

    def _collect(self) -> None:
        for running in list(self._running):
            code = running.process.poll()
            late = time.monotonic() > running.stop_at
            if code is None and not late:
                self._report_progress(running)
                continue
            taken = time.monotonic() - running.began
            _end(running.process)  # with its children
            self._running.remove(running)
            if code == 0:
                record = Record(DONE)
            elif code is not None:
                record = Record(FAILED, _why_failed(code, _tail(running.folder / "stderr")))
            else:
                which = "the run's deadline" if running.stop_at == self._deadline else "its limit"
                record = Record(STOPPED, f"stopped after {taken:.0f} s, {which}")
            self._finish(running, record)

    def _report_progress(self, running: _Running) -> None:
        """Report the result of a phase so far, if it has changed."""
        with suppress(OSError):
            written = (running.folder / "result.json").stat().st_mtime_ns
            if written != running.written:
                running.written = written
                self._record(running.phase, Record(RUNNING, RUNNING, running.started, None, _result(running.folder)))

    def _finish(self, running: _Running, record: Record) -> None:
        result, seconds = _result(running.folder), round(time.monotonic() - running.began, 1)
        stderr = None if record.status == DONE else _tail(running.folder / "stderr")
        self._record(running.phase, Record(record.status, record.reason, running.started, seconds, result, stderr))

    def _record(self, phase: Phase, record: Record) -> None:
        self.records[phase.name] = record
        self._report(self.records)


def _result(folder: Path) -> dict[str, Any] | None:
    """The result that a phase has written, or None."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())
        return found
    return None


def _tail(stderr: Path) -> str:
    with suppress(OSError):
        return stderr.read_text(errors="replace").strip()[-TAIL:]
    return ""


def _why_failed(code: int, stderr: str) -> str:
    """The last line of stderr, or the signal that ended the process."""
    if code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return (stderr.splitlines() or [f"exit code {code}, nothing on stderr"])[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: with SIGTERM, then with SIGKILL."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        _signal(process, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)  # a process that hangs in the driver cannot be ended


def _signal(process: subprocess.Popen[bytes], kind: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, kind)
