"""How many workers of how many threads: measured on this machine, because it depends on the model and the processor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from flexvar_runtime import FlexVARError
from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.machine.processors import default_threads
from flexvar_runtime.memory.available import available_bytes
from flexvar_runtime.request import RequestDefaults

from .settings import Layout, ModelSettings
from .workers.handle import start_process
from .workers.messages import Batch, Done, Failed, Item, Ready, Refused, Stop
from .workers.process import WorkerSetup, open_pipeline

SECONDS = 2.0
"""How long each layout is measured, at least. One batch of each worker is always measured."""
TOO_LONG = 120.0
"""Seconds without any message after which a measurement is given up."""
GAIN = 1.05
"""More workers, which take more memory, must be this much faster."""


@dataclass(frozen=True)
class Measured:
    """A layout, and the images that it generated in a second."""

    workers: int
    threads: int
    images_per_second: float

    def __str__(self) -> str:
        return f"{_workers(self.workers)} of {_threads(self.threads)}: {self.images_per_second:.3g} images/s"


def candidates(processors: int) -> tuple[int, ...]:
    """Numbers of workers to try: one, one for each processor, and one between."""
    between = 2 ** round(math.log2(processors) / 2)
    return tuple(sorted({1, between, processors}))


def choose_layout(model: ModelSettings, device: str | None, say: Callable[[str], None]) -> Layout:
    """The fastest layout on this CPU. Raises FlexVARError if the bundle does not open.

    device: "cpu" or None. It measures for some seconds. Other programs that run at the
    same time spoil the result.
    """
    processors = default_threads()
    best: Measured | None = None
    taken = 0
    for workers in candidates(processors):
        before = available_bytes()
        if best is not None and before is not None and taken * workers > before:
            say(f"{_workers(workers)} would not fit in memory")
            break
        setup = WorkerSetup(model=model, device=device, threads=processors // workers)
        try:
            measured, left = _measure(setup, workers)
        except FlexVARError as error:
            if best is None:
                raise
            say(f"{_workers(workers)} cannot be measured: {error.got}")
            break
        if workers == 1 and before is not None and left is not None:
            taken = max(0, before - left)
        say(str(measured))
        if best is None or measured.images_per_second > GAIN * best.images_per_second:
            best = measured
        if processors == 1:
            break
    assert best is not None
    return Layout(devices=(device,) * best.workers, threads=best.threads)


def _measure(setup: WorkerSetup, workers: int) -> tuple[Measured, int | None]:
    """The speed of a layout, and the memory that is left beside it."""
    connections, processes = [], []
    for _ in range(workers):
        near, far = Pipe()
        processes.append(start_process(far, setup, open_pipeline))
        far.close()
        connections.append(near)
    try:
        ready = [_ready(connection) for connection in connections]
        return Measured(workers, setup.threads or 1, _speed(connections, ready[0])), available_bytes()
    finally:
        for connection in connections:
            try:
                connection.send(Stop())
            except OSError:
                continue
        for process, connection in zip(processes, connections, strict=True):
            process.join(10)
            process.kill()
            connection.close()


def _speed(connections: list[Connection], ready: Ready) -> float:
    """Images a second while every connection runs one image after another."""
    defaults = RequestDefaults.of(ready.manifest.defaults)
    items = (Item(0, 0, 0, defaults.guidance),)
    batch = Batch(number=0, items=items, schedule=defaults.schedule, sampling=defaults.sampling)
    started, images, busy = time.monotonic(), 0, set(connections)
    for connection in connections:
        connection.send(batch)
    while busy:
        answered = wait(busy, TOO_LONG)
        if not answered:
            got, fix = "A worker did not answer while it was measured.", "Pass --workers and --threads."
            raise EnvironmentFailed(got, expected="a worker that answers", fix=fix)
        for connection in busy.intersection(answered):
            message = _received(connection)
            if isinstance(message, Failed):
                raise message.error
            if not isinstance(message, Done):
                continue
            images += 1
            if time.monotonic() - started < SECONDS:
                connection.send(batch)
            else:
                busy.discard(connection)
    return images / (time.monotonic() - started)


def _ready(connection: Connection) -> Ready:
    message = _received(connection)
    if isinstance(message, Refused):
        raise message.error
    assert isinstance(message, Ready)
    return message


def _received(connection: Connection) -> object:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        got, fix = "A worker ended while it was measured.", "Pass --workers 1, or free memory."
        raise EnvironmentFailed(got, expected="a worker that runs", fix=fix) from error


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
