"""Processes that generate images on demand, one for each variant, so that each has its own memory."""

from __future__ import annotations

import multiprocessing as mp
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import FlexVARError
from flexvar_runtime.machine.signals import blocked_in_children

from .variants import Caller, CostWork, PlainCaller, RuntimeCaller, Sample, SavedCosts, Subject, Work, opened

RESET, PEAK = "reset the peak of memory", "the peak of memory"  # requests to a process, in addition to work


@dataclass(frozen=True)
class EnergyWork:
    """Asks for the energy of a call on a GPU."""

    work: Work


@dataclass(frozen=True)
class Worker:
    """A process, seen from the parent.

    refusal: why the variant could not be opened, else None. precision: the one that its library computes in, None if it
    follows from the bundle or the variant.
    """

    subject: Subject
    connection: Connection
    refusal: str | None
    precision: str | None = None

    def call(self, work: Work) -> Sample | str:
        """The sample of one call, or why it failed."""
        answer: Sample | str = self._ask(work)
        return answer

    def save_costs(self, work: CostWork) -> SavedCosts | str:
        """Measure and save costs for deadlines, or return why that failed. Only for backends of the runtime."""
        answer: SavedCosts | str = self._ask(work)
        return answer

    def joules(self, work: Work) -> float | None:
        """The energy of one call on a GPU, None if it is not counted. It takes at least a second."""
        joules = self._ask(EnergyWork(work))
        return joules if isinstance(joules, float) else None

    def _ask(self, work: Work | CostWork | EnergyWork | str) -> Any:
        if self.refusal is not None:
            return self.refusal
        try:
            self.connection.send(work)
            return self.connection.recv()
        except (EOFError, OSError):
            return "the process ended"

    def reset_peak(self) -> bool:
        """Reset the peak of resident memory. False if the system does not allow it."""
        return self._ask(RESET) is True

    def peak_bytes(self) -> int | None:
        """The peak of resident memory since it was reset."""
        peak = self._ask(PEAK)
        return peak if isinstance(peak, int) else None


@contextmanager
def started(subjects: Sequence[Subject]) -> Iterator[list[Worker]]:
    """Start a process for each subject, one after the other. A variant that cannot open has a `refusal`."""
    context = mp.get_context("spawn")
    with ExitStack() as stack:
        workers = []
        for subject in subjects:
            near, far = context.Pipe()
            process = context.Process(target=_serve, args=(far, subject), daemon=True)
            with blocked_in_children({signal.SIGINT}):
                process.start()
            far.close()  # so that the end of a process is noticed
            stack.callback(_end, process, near)
            try:
                refusal, precision = near.recv()
            except EOFError:
                refusal, precision = "the process ended while it opened", None
            workers.append(Worker(subject, near, refusal, precision))
        yield workers


def _end(process: mp.process.BaseProcess, connection: Connection) -> None:
    connection.close()
    process.join(timeout=10)
    if process.is_alive():
        process.kill()


def _serve(connection: Connection, subject: Subject) -> None:
    """Send why the variant cannot open, or None, and its precision. Then answer each request."""
    with ExitStack() as stack:
        try:
            call = stack.enter_context(opened(subject))
        except Exception as error:  # a library may raise anything
            connection.send((str(error) if isinstance(error, FlexVARError) else _describe(error), None))
            return
        connection.send((None, call.precision if isinstance(call, PlainCaller) else None))
        with suppress(EOFError, OSError):  # the parent has ended
            while True:
                connection.send(_answer(call, connection.recv()))


def _answer(call: Caller, work: Work | CostWork | EnergyWork | str) -> Sample | SavedCosts | float | str | None:
    try:
        if isinstance(work, Work):
            return call(work)
        if isinstance(work, EnergyWork):
            return call.joules(work.work) if isinstance(call, RuntimeCaller) else None
        if isinstance(work, str):
            return _reset_peak() if work == RESET else _peak_bytes()
        return call.save_costs(work) if isinstance(call, RuntimeCaller) else "not a backend of the runtime"
    except Exception as error:  # ONNX Runtime raises subclasses of Exception only
        return _describe(error)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    """The peak from /proc, because ru_maxrss includes the size of the parent before this program was loaded."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
