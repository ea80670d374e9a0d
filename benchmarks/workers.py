"""Processes that make images on demand: one a variant, so that each has its own memory, and only one of them works."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import FlexVARError

from .variants import CostWork, Kept, Make, PlainMake, RuntimeMake, Sample, Subject, Work, opened

RESET, PEAK = "reset the peak of memory", "the peak of memory"  # asked of a process beside work


@dataclass(frozen=True)
class EnergyWork:
    """Work whose energy is asked for, on a GPU."""

    work: Work


@dataclass(frozen=True)
class Worker:
    """The near end of a process. refusal: why it made nothing; precision: what its library chose to compute in, None
    where that is the bundle's or the variant's."""

    subject: Subject
    connection: Connection
    refusal: str | None
    precision: str | None = None

    def make(self, work: Work) -> Sample | str:
        """One call, or why it failed."""
        answer: Sample | str = self._ask(work)
        return answer

    def keep_costs(self, work: CostWork) -> Kept | str:
        """Measure and keep what deadlines go by, or why that failed. For backends of the runtime."""
        answer: Kept | str = self._ask(work)
        return answer

    def joules(self, work: Work) -> float | None:
        """Of one call, where it is counted: on a GPU. Takes a second and more there."""
        joules = self._ask(EnergyWork(work))
        return joules if isinstance(joules, float) else None

    def _ask(self, work: Work | CostWork | EnergyWork | str) -> Any:
        if self.refusal is not None:
            return self.refusal
        try:
            self.connection.send(work)
            return self.connection.recv()
        except (EOFError, OSError):
            return "the process died"

    def reset_peak(self) -> bool:
        """Let the height of resident memory be counted from now on. False where the system does not allow it."""
        return self._ask(RESET) is True

    def peak_bytes(self) -> int | None:
        """Resident memory at its height since it was reset."""
        peak = self._ask(PEAK)
        return peak if isinstance(peak, int) else None


@contextmanager
def started(subjects: Sequence[Subject]) -> Iterator[list[Worker]]:
    """A process each, opened one after the other; those that cannot open say why."""
    context = mp.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, subject), daemon=True)
            process.start()
            far.close()  # so that a process that dies is noticed
            stack.callback(_end, process, near)
            try:
                refusal, precision = near.recv()
            except EOFError:
                refusal, precision = "the process died while it opened", None
            workers.append(Worker(subject, near, refusal, precision))
        yield workers


def _end(process: mp.process.BaseProcess, connection: Connection) -> None:
    connection.close()
    process.join(timeout=10)
    if process.is_alive():
        process.kill()


def _serve(connection: Connection, subject: Subject) -> None:
    """Say why it cannot open, if so, and in what it computes; then answer work with samples or kept costs."""
    with ExitStack() as stack:
        try:
            make = stack.enter_context(opened(subject))
        except Exception as error:  # a library may raise anything
            connection.send((str(error) if isinstance(error, FlexVARError) else _said(error), None))
            return
        connection.send((None, make.precision if isinstance(make, PlainMake) else None))
        with suppress(EOFError):
            while True:
                connection.send(_answer(make, connection.recv()))


def _answer(make: Make, work: Work | CostWork | EnergyWork | str) -> Sample | Kept | float | str | None:
    try:
        if isinstance(work, Work):
            return make(work)
        if isinstance(work, EnergyWork):
            return make.joules(work.work) if isinstance(make, RuntimeMake) else None
        if isinstance(work, str):
            return _reset_peak() if work == RESET else _peak_bytes()
        return make.keep_costs(work) if isinstance(make, RuntimeMake) else "no backend of the runtime"
    except Exception as error:  # those of ONNX Runtime derive from nothing else
        return _said(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """Not ru_maxrss: that remembers the parent's size from before this process's own program was loaded."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
