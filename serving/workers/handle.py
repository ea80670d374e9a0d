"""One worker as the service sees it: its process or thread, its connection, and what it does at the moment."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing as mp
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from flexvar_runtime.machine.signals import blocked_in_children

from .messages import Batch, Cancel, Ping, Ready, Stop
from .process import Opener, WorkerSetup, open_pipeline, run

log = logging.getLogger(__name__)


class Owner(Protocol):
    """Receives the messages of a worker, in the event loop."""

    def heard(self, worker: WorkerHandle, message: Any) -> None:
        """A message came."""

    def lost(self, worker: WorkerHandle) -> None:
        """The worker has ended."""


class WorkerHandle:
    """A started worker.

    ready: what it said when it had opened the bundle; None until then. batch: the one that it runs, since `started`,
    and for which `expected` seconds are forecast. heard_at: when its last message came. Both times are of
    `time.monotonic`. ends: whether it has said that it ends.
    """

    def __init__(self, setup: WorkerSetup, owner: Owner, *, in_thread: bool, opener: Opener = open_pipeline) -> None:
        self.setup = setup
        self.ready: Ready | None = None
        self.batch: Batch | None = None
        self.started = self.heard_at = time.monotonic()
        self.expected = 0.0
        self.pinged = self.ends = False
        self._owner, self._loop = owner, asyncio.get_running_loop()
        self._connection, far = mp.Pipe()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="flexvar-send")
        self._process = None if in_thread else start_process(far, setup, opener)
        if self._process is not None:
            far.close()  # so that the end of the process is noticed
        else:
            threading.Thread(
                target=run_in_thread, args=(far, setup, opener), name="flexvar-worker", daemon=True
            ).start()
        threading.Thread(target=self._listen, name="flexvar-listen", daemon=True).start()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def idle(self) -> bool:
        """Whether it can take a batch now."""
        return self.ready is not None and self.batch is None and not self.ends

    @property
    def can_be_killed(self) -> bool:
        return self._process is not None

    @property
    def exit_code(self) -> int | None:
        """That of its process; negative for a signal. None while it runs, and for a thread."""
        return None if self._process is None else self._process.exitcode

    def start(self, batch: Batch, expected: float) -> None:
        """Send a batch. The worker must be idle."""
        self.batch, self.expected, self.started = batch, expected, time.monotonic()
        self.heard_at = self.started
        self._send(batch)

    def cancel(self) -> None:
        """Ask the worker to end its batch at the next scale."""
        if self.batch is not None:
            self._send(Cancel(self.batch.number))

    def ping(self) -> None:
        self.pinged = True
        self._send(Ping())

    def stop(self) -> None:
        """Ask the worker to end. It ends at the next scale."""
        self._send(Stop())

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def join(self, timeout: float) -> None:
        """Wait for the process, and kill it if it takes too long."""
        if self._process is not None:
            self._process.join(timeout)
            self._process.kill()
            self._process.join(5)
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._connection.close()

    def _send(self, message: object) -> None:
        """Send in a thread: a pipe that is full would stop the event loop."""

        def send() -> None:
            with suppress(OSError, ValueError):  # it has ended, and `_listen` notices
                self._connection.send(message)

        with suppress(RuntimeError):  # closed
            self._sender.submit(send)

    def _listen(self) -> None:
        with suppress(RuntimeError):  # the event loop is closed
            try:
                while True:
                    message = self._connection.recv()
                    self._loop.call_soon_threadsafe(self._heard, message)
            except Exception as error:
                if not isinstance(error, EOFError | OSError):
                    log.error("a message of a worker cannot be read", exc_info=error)
                    self.kill()
                self._loop.call_soon_threadsafe(self._owner.lost, self)

    def _heard(self, message: Any) -> None:
        self.heard_at, self.pinged = time.monotonic(), False
        self._owner.heard(self, message)


def run_in_thread(connection: Connection, setup: WorkerSetup, opener: Opener) -> None:
    with connection:
        run(connection, setup, opener)


def start_process(far: Connection, setup: WorkerSetup, opener: Opener) -> mp.process.BaseProcess:
    """A new worker process that answers the other end of `far`. It ignores SIGINT and SIGTERM from its start."""
    process = mp.get_context("spawn").Process(target=run, args=(far, setup, opener), daemon=True, name="flexvar-worker")
    with blocked_in_children({signal.SIGINT, signal.SIGTERM}):
        process.start()
    return process
