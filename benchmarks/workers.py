"""Processes that make images on demand: one a variant, so that each has its own memory, and only one of them works."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import FlexVARError

from .variants import CostWork, Kept, Make, RuntimeMake, Sample, Subject, Work, opened


@dataclass(frozen=True)
class Worker:
    """The near end of a process. refusal: why it made nothing."""

    subject: Subject
    connection: Connection
    refusal: str | None

    def make(self, work: Work) -> Sample | str:
        """One call, or why it failed."""
        answer: Sample | str = self._ask(work)
        return answer

    def keep_costs(self, work: CostWork) -> Kept | str:
        """Measure and keep what deadlines go by, or why that failed. For backends of the runtime."""
        answer: Kept | str = self._ask(work)
        return answer

    def _ask(self, work: Work | CostWork) -> Any:
        if self.refusal is not None:
            return self.refusal
        try:
            self.connection.send(work)
            return self.connection.recv()
        except (EOFError, OSError):
            return "the process died"

    def peak_bytes(self) -> int | None:
        """Resident memory at its height so far."""
        if self.refusal is not None:
            return None
        try:
            self.connection.send(None)
            peak: int = self.connection.recv()
        except (EOFError, OSError):
            return None
        return peak


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
                refusal = near.recv()
            except EOFError:
                refusal = "the process died while it opened"
            workers.append(Worker(subject, near, refusal))
        yield workers


def _end(process: mp.process.BaseProcess, connection: Connection) -> None:
    connection.close()
    process.join(timeout=10)
    if process.is_alive():
        process.kill()


def _serve(connection: Connection, subject: Subject) -> None:
    """Say None once open, or why not; then answer work with samples or kept costs, and None with the peak of memory."""
    try:
        with opened(subject) as make:
            connection.send(None)
            while True:
                work = connection.recv()
                if work is None:
                    connection.send(_peak_bytes())
                    continue
                connection.send(_answer(make, work))
    except FlexVARError as error:
        connection.send(str(error))
    except EOFError:
        return


def _answer(make: Make, work: Work | CostWork) -> Sample | Kept | str:
    try:
        if isinstance(work, Work):
            return make(work)
        return make.keep_costs(work) if isinstance(make, RuntimeMake) else "no backend of the runtime"
    except (FlexVARError, MemoryError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"[:500]


def _peak_bytes() -> int:
    """Not ru_maxrss: that remembers the parent's size from before this process's own program was loaded."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
