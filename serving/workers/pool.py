"""The workers of a service: they are started, watched, and replaced when they end or hang."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any, Protocol

from flexvar_runtime import ArtifactRefused, FlexVARError
from flexvar_runtime.errors import EnvironmentFailed

from ..errors import WorkersKeepDying
from ..settings import ServiceSettings
from .handle import WorkerHandle
from .messages import Ready, Refused
from .process import Opener, WorkerSetup

log = logging.getLogger(__name__)

MOST_DEATHS, DEATHS_WITHIN = 5, 300.0
"""The service ends when more workers than this have died within so many seconds."""
START_SECONDS = 600.0
"""How long a worker may take to open the bundle and warm up."""
PING_SECONDS = 5.0
"""How often an idle worker is asked whether it is alive."""


class User(Protocol):
    """Who gives work to the workers."""

    def worker_ready(self, ready: Ready) -> None:
        """A worker takes batches from now on."""

    def worker_said(self, worker: WorkerHandle, message: Any) -> None:
        """A worker sent a message about its batch, or a sign of life."""

    def worker_lost(self, worker: WorkerHandle) -> None:
        """A worker has ended. It still has the batch that it ran."""


class Pool:
    """The workers. facts: what the first one said of the bundle; None until then. failed: why the service must end.

    All methods run in the event loop.
    """

    def __init__(self, settings: ServiceSettings, user: User, opener: Opener) -> None:
        self.facts: Ready | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.workers: list[WorkerHandle] = []
        self._settings, self._user, self._opener = settings, user, opener
        self._deaths: deque[float] = deque()
        self._all_ready = asyncio.Event()
        self._stopping = False

    async def start(self) -> Ready:
        """Start all workers, and wait until they are ready. Raises FlexVARError if one cannot open the bundle."""
        layout = self._settings.layout
        for device in layout.devices:
            self._start_one(WorkerSetup(model=self._settings.model, device=device, threads=layout.threads))
        waiting = asyncio.create_task(self._all_ready.wait())
        self.failed.add_done_callback(lambda _: waiting.cancel())
        try:
            await waiting
        except asyncio.CancelledError:
            if not self.failed.done():
                raise
            self.failed.result()
        assert self.facts is not None
        return self.facts

    async def stop(self) -> None:
        """End all workers. What they still run is lost."""
        self._stopping = True
        for worker in self.workers:
            if not worker.idle:
                worker.kill()  # it would not listen at once
            worker.stop()
        await asyncio.gather(*(asyncio.to_thread(worker.join, 10.0) for worker in self.workers))

    @property
    def ready(self) -> bool:
        """Whether all have been ready, and one can take a batch now, or when it is done with its own."""
        return self._all_ready.is_set() and any(worker.ready is not None for worker in self.workers)

    @property
    def idle(self) -> list[WorkerHandle]:
        return [worker for worker in self.workers if worker.idle]

    @property
    def busy(self) -> list[WorkerHandle]:
        return [worker for worker in self.workers if worker.batch is not None]

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers if worker.pid is not None]

    def check(self, now: float) -> None:
        """Ask idle workers for a sign of life, and end those that hang."""
        for worker in list(self.workers):
            silent = now - worker.heard_at
            if silent > self._patience(worker):
                log.error("a worker was silent for %.0f seconds and is ended", silent)
                worker.kill()
                if not worker.can_be_killed:
                    self.lost(worker)
            elif worker.idle and not worker.pinged and silent > PING_SECONDS:
                worker.ping()

    def heard(self, worker: WorkerHandle, message: Any) -> None:
        match message:
            case Ready():
                self._take_ready(worker, message)
            case Refused(error=error):
                self._take_refusal(error)
            case _:
                self._user.worker_said(worker, message)

    def lost(self, worker: WorkerHandle) -> None:
        """A worker has ended: start another one."""
        if self._stopping or worker not in self.workers:
            return
        self.workers.remove(worker)
        asyncio.get_running_loop().run_in_executor(None, _log_end, worker)
        self._user.worker_lost(worker)
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - DEATHS_WITHIN:
            self._deaths.popleft()
        if not worker.can_be_killed:
            got, fix = "The worker thread ended or did not answer.", "Pass --workers 1 or more: processes are replaced."
            self._fail(WorkersKeepDying(got, expected="a worker that keeps running", fix=fix))
        elif len(self._deaths) > MOST_DEATHS:
            got = f"{len(self._deaths)} worker processes ended within {DEATHS_WITHIN:.0f} seconds."
            fix = "Look for the reason in the log on standard error. Too little memory is a common one."
            self._fail(WorkersKeepDying(got, expected="workers that keep running", fix=fix))
        else:
            self._start_one(worker.setup)

    def _start_one(self, setup: WorkerSetup) -> None:
        in_thread = self._settings.layout.in_thread
        self.workers.append(WorkerHandle(setup, self, in_thread=in_thread, opener=self._opener))

    def _take_ready(self, worker: WorkerHandle, ready: Ready) -> None:
        if self.facts is None:
            self.facts = ready
        elif self.facts.bundle != ready.bundle:
            got, fix = "The bundle was replaced while it is served.", "Start the service again."
            self._fail(ArtifactRefused(got, expected="the same bundle", fix=fix))
            return
        worker.ready = ready
        if all(one.ready is not None for one in self.workers):
            self._all_ready.set()
        self._user.worker_ready(ready)

    def _take_refusal(self, error: Exception) -> None:
        """A worker cannot open the bundle. At the start that ends the service; later it counts as a death."""
        if self._all_ready.is_set():
            log.error("a worker cannot open the bundle: %s", error)
            return
        if not isinstance(error, FlexVARError):
            got, fix = "A worker failed while it opened the bundle.", "Its message is above."
            error = EnvironmentFailed(got, expected="a bundle that opens", fix=fix)
        self._fail(error)

    def _fail(self, error: FlexVARError) -> None:
        self._stopping = True
        if not self.failed.done():
            self.failed.set_exception(error)

    def _patience(self, worker: WorkerHandle) -> float:
        """Seconds for which a worker may be silent."""
        if worker.ready is None:
            return START_SECONDS
        return self._settings.hang_seconds + (PING_SECONDS if worker.batch is None else 10 * worker.expected)


def _log_end(worker: WorkerHandle) -> None:
    """Wait for the end of a lost worker, and log it."""
    running = worker.batch is not None
    worker.join(1.0)
    code = "" if worker.exit_code is None else f" with exit code {worker.exit_code}"
    log.warning("a worker has ended%s%s", code, " while it ran a batch" if running else "")
