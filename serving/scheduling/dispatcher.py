"""Brings jobs and workers together: forms batches, watches the workers, restarts them, and hands out results."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from flexvar_runtime import FlexVARError, ScaleSchedule
from flexvar_runtime.errors import EnvironmentFailed

from ..errors import HTTPError, WorkersKeepDying, of_worker, worker_lost
from ..metrics import Metrics
from ..settings import ServiceSettings
from ..workers.handle import WorkerHandle
from ..workers.messages import Batch, Cancelled, Done, Failed, Preview, Ready, Refused
from ..workers.process import Opener, WorkerSetup, open_pipeline
from .costs import Costs, Work
from .orders import Image, Order, Scale, Spent
from .queue import Entry, Queue

log = logging.getLogger(__name__)

MOST_DEATHS, DEATHS_WITHIN = 5, 300.0
"""The service ends when more workers than this have died within so many seconds."""
START_SECONDS = 600.0
"""How long a worker may take to open the bundle and warm up."""
PING_SECONDS = 5.0
"""How often an idle worker is asked whether it is alive."""
WATCH_SECONDS = 0.5


class Job:
    """An order that waits or runs.

    finished: a future of its images. scales: a queue of its previews, ended by None. name: of its request, for the log.
    """

    def __init__(self, number: int, order: Order, arrived: float, deadline: float | None, name: str) -> None:
        self.number, self.order, self.arrived, self.deadline, self.name = number, order, arrived, deadline, name
        self.finished: asyncio.Future[tuple[list[Image], Spent]] = asyncio.get_running_loop().create_future()
        self.finished.add_done_callback(lambda future: future.cancelled() or future.exception())  # it is seen
        self.scales: asyncio.Queue[Scale | None] = asyncio.Queue()
        self.images: dict[int, Image] = {}
        self.started: float | None = None
        self.decode = 0.0
        self.running = False
        self.shown = -1  # the last scale of a stream, which has one image

    @property
    def over(self) -> bool:
        return self.finished.done()

    def entries(self, seconds: float) -> list[Entry]:
        key = self.order.key(self.number)
        return [
            Entry(job=self.number, index=i, key=key, seconds=seconds, arrived=self.arrived, deadline=self.deadline)
            for i in range(self.order.images)
        ]

    def fail(self, error: Exception) -> None:
        if not self.over:
            self.finished.set_exception(error)
        self.scales.put_nowait(None)

    def put(self, index: int, image: Image, now: float) -> None:
        self.images[index] = image
        if len(self.images) == self.order.images and not self.over:
            started = now if self.started is None else self.started
            spent = Spent(started - self.arrived, now - started, self.decode)
            self.finished.set_result(([self.images[i] for i in range(self.order.images)], spent))
            self.scales.put_nowait(None)


class Dispatcher:
    """The queue, the jobs and the workers of a service. All methods run in the event loop."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics, opener: Opener = open_pipeline) -> None:
        self.settings, self.metrics = settings, metrics
        self.queue, self.costs = Queue(settings.limits.queue), Costs()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.facts: Ready | None = None
        self._opener = opener
        self._jobs: dict[int, Job] = {}
        self._batches: dict[int, tuple[Entry, ...]] = {}
        self._numbers = itertools.count(1)
        self._workers: list[WorkerHandle] = []
        self._deaths: deque[float] = deque()
        self._stopping = False
        self._watcher: asyncio.Task[None] | None = None
        self._started = asyncio.Event()

    # Workers

    async def start(self) -> Ready:
        """Start all workers, and wait until they are ready. Raises FlexVARError if one cannot open the bundle."""
        layout = self.settings.layout
        for device in layout.devices:
            self._start_worker(WorkerSetup(model=self.settings.model, device=device, threads=layout.threads))
        self._watcher = asyncio.create_task(self._watch())
        waiting = asyncio.create_task(self._started.wait())
        self.failed.add_done_callback(lambda _: waiting.cancel())
        try:
            await waiting
        except asyncio.CancelledError:
            if not self.failed.done():
                raise
            self.failed.result()
        assert self.facts is not None
        return self.facts

    @property
    def ready(self) -> bool:
        """Whether a worker can take a batch, now or when it is done with its own."""
        return self._started.is_set() and any(worker.ready is not None for worker in self._workers)

    @property
    def pids(self) -> list[int | None]:
        return [worker.pid for worker in self._workers]

    def drop_all(self) -> None:
        """Fail every job, because the service ends."""
        error = HTTPError(503, "The service is stopping. Send the request again.", "stopping", retry_after=5)
        for job in list(self._jobs.values()):
            self._drop(job, error)

    async def stop(self) -> None:
        """End all workers. What still runs is dropped."""
        self._stopping = True
        if self._watcher is not None:
            self._watcher.cancel()
        self.drop_all()
        for worker in self._workers:
            if not worker.idle:
                worker.kill()  # it would not listen at once
            worker.stop()
        await asyncio.gather(*(asyncio.to_thread(worker.join, 10.0) for worker in self._workers))

    def _start_worker(self, setup: WorkerSetup) -> None:
        in_thread = self.settings.layout.in_thread
        self._workers.append(WorkerHandle(setup, self, in_thread=in_thread, opener=self._opener))

    def heard(self, worker: WorkerHandle, message: Any) -> None:
        """Take a message of a worker."""
        match message:
            case Ready():
                worker.ready = message
                self._take_facts(message)
            case Refused(error=error):
                self._refused(error)
            case Preview():
                self._show(message)
                return
            case Done():
                self._done(worker, message)
            case Failed(number=number, error=error):
                worker.batch, worker.ends = None, message.ends
                self._give_up(number, of_worker(error))
            case Cancelled(number=number):
                self._batches.pop(number, None)
                worker.batch = None
        self._dispatch()

    def lost(self, worker: WorkerHandle) -> None:
        """A worker has ended: fail what it ran, and start another one."""
        if self._stopping or worker not in self._workers:
            return
        self._workers.remove(worker)
        now = time.monotonic()
        asyncio.get_running_loop().run_in_executor(None, _end, worker)
        if worker.batch is not None:
            self._give_up(worker.batch.number, worker_lost())
        self.metrics.restarts.inc()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - DEATHS_WITHIN:
            self._deaths.popleft()
        if len(self._deaths) > MOST_DEATHS or not worker.can_be_killed:
            got = f"{len(self._deaths)} worker processes ended within {DEATHS_WITHIN:.0f} seconds."
            fix = "Look for the reason in the log on standard error. Too little memory is a common one."
            if not worker.can_be_killed:
                got, fix = (
                    "The worker thread ended or did not answer.",
                    "Pass --workers 1 or more: processes are replaced.",
                )
            self._fail(WorkersKeepDying(got, expected="workers that keep running", fix=fix))
            return
        self._start_worker(worker.setup)
        self._dispatch()

    def _take_facts(self, ready: Ready) -> None:
        if self.facts is None:
            self.facts = ready
            for schedule, guided, images, seconds in ready.measured:
                self.costs = self.costs.observed(Work.of(schedule, guided, images), seconds)
        if all(worker.ready is not None for worker in self._workers):
            self._started.set()

    def _refused(self, error: Exception) -> None:
        """A worker cannot open the bundle. At the start that ends the service; later it counts as a death."""
        if self._started.is_set():
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
        self.drop_all()

    async def _watch(self) -> None:
        """Expire deadlines and notice workers that hang."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            self.metrics.lag.observe(max(0.0, now - before - WATCH_SECONDS))
            self._expire(now)
            for worker in list(self._workers):
                if now - worker.heard_at > self._patience(worker):
                    self._end_hung(worker)
                elif worker.idle and not worker.pinged and now - worker.heard_at > PING_SECONDS:
                    worker.ping()

    def _patience(self, worker: WorkerHandle) -> float:
        """Seconds for which a worker may be silent."""
        if worker.ready is None:
            return START_SECONDS
        return self.settings.hang_seconds + (PING_SECONDS if worker.batch is None else 10 * worker.expected)

    def _end_hung(self, worker: WorkerHandle) -> None:
        log.error("a worker was silent for %.0f seconds and is ended", time.monotonic() - worker.heard_at)
        worker.kill()
        if not worker.can_be_killed:
            self.lost(worker)

    # Jobs

    def submit(self, order: Order, deadline: float | None, name: str) -> Job:
        """Put an order in the queue. deadline: on time.monotonic. name: for the log. Raises HTTPError if there is no
        room."""
        if not self.ready:
            raise HTTPError(503, "No worker is ready. Try again in a moment.", "not_ready", retry_after=2)
        if order.images > self.queue.limit:
            got = f"n is {order.images}, but the queue of this service holds {self.queue.limit} images. Ask for fewer."
            raise HTTPError(400, got, "too_many", "n")
        if not self.queue.has_room(order.images):
            wait = max(1, math.ceil(self.forecast(order)))
            got = f"{len(self.queue)} images wait, and there is no room for {order.images} more. Try again in {wait} s."
            raise HTTPError(429, got, "queue_full", retry_after=wait)
        job = Job(next(self._numbers), order, time.monotonic(), deadline, name)
        self._jobs[job.number] = job
        self.queue = self.queue.with_entries(job.entries(self.seconds(order)))
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more. It leaves the queue at once. A batch ends early if all its jobs are gone."""
        if job.over:
            return
        self.metrics.cancelled.labels("running" if job.running else "queued").inc()
        job.finished.cancel()
        self._forget(job)
        self._cancel_unwanted()
        self._dispatch()

    def _cancel_unwanted(self) -> None:
        """End batches for which nobody waits."""
        for worker in self._workers:
            if worker.batch is not None and not self._wanted(worker.batch.number):
                worker.cancel()

    def forecast(self, order: Order) -> float:
        """Seconds until a worker would begin with an order."""
        now, workers = time.monotonic(), max(1, sum(worker.ready is not None for worker in self._workers))
        busy = [worker for worker in self._workers if worker.batch is not None]
        running = sum(max(0.0, worker.expected - (now - worker.started)) for worker in busy)
        idle = any(worker.idle for worker in self._workers)
        if idle and not len(self.queue):
            return 0.0
        return (running + self.queue.seconds(self.seconds(order))) / workers

    def seconds(self, order: Order) -> float:
        """Forecast of the generation of an order, without the queue."""
        return sum(self.costs.mean(order.work(images)) for images in self._batch_sizes(order.images))

    def careful_seconds(self, order: Order, schedule: ScaleSchedule) -> float:
        """Seconds that the images of an order with another schedule seldom exceed."""
        guided = order.guidance.acts(schedule)
        sizes = self._batch_sizes(order.images)
        return sum(self.costs.careful(Work.of(schedule, guided, images)) for images in sizes)

    def _batch_sizes(self, images: int) -> list[int]:
        """The sizes of the batches in which `images` run when nothing else waits."""
        sizes: list[int] = []
        while images:
            sizes.append(max(size for size in self.settings.model.batch_sizes if size <= images))
            images -= sizes[-1]
        return sizes

    def _dispatch(self) -> None:
        """Give every idle worker a batch."""
        self._expire(time.monotonic())
        for worker in self._workers:
            if not worker.idle:
                continue
            entries, self.queue = self.queue.next_batch(time.monotonic(), self.settings.model.batch_sizes)
            if not entries:
                break
            self._run(worker, entries)
        self.metrics.queued.set(len(self.queue))

    def _run(self, worker: WorkerHandle, entries: Sequence[Entry]) -> None:
        now, number = time.monotonic(), next(self._numbers)
        jobs = [self._jobs[entry.job] for entry in entries]
        for job in jobs:
            job.running = True
            if job.started is None:
                job.started = now
                self.metrics.queue.observe(now - job.arrived)
        first = jobs[0].order
        self._batches[number] = tuple(entries)
        expected = self.costs.careful(first.work(len(entries)))
        worker.start(
            Batch(
                number=number,
                items=tuple(job.order.item(entry.index) for job, entry in zip(jobs, entries, strict=True)),
                schedule=first.schedule,
                sampling=first.sampling,
                previews=first.previews,
                edit=first.edit,
                max_tokens=first.max_tokens,
            ),
            expected,
        )

    def _show(self, preview: Preview) -> None:
        entries = self._batches.get(preview.number, ())[preview.first : preview.first + len(preview.pixels)]
        for entry, pixels in zip(entries, preview.pixels, strict=True):
            job = self._jobs.get(entry.job)
            if job is not None and not job.over and preview.scale > job.shown:  # a batch may begin again in parts
                job.shown = preview.scale
                job.scales.put_nowait(Scale(entry.index, pixels, preview.scale, preview.scales, preview.size))

    def _done(self, worker: WorkerHandle, done: Done) -> None:
        worker.batch = None
        entries, now = self._batches.pop(done.number, ()), time.monotonic()
        self.metrics.generation.observe(done.seconds)
        self.metrics.decode.observe(done.decode)
        for together in _runs(done.together):
            self.metrics.batch.observe(together)
        for entry, pixels, settings, together in zip(entries, done.pixels, done.settings, done.together, strict=True):
            job = self._jobs.get(entry.job)
            if job is None:
                continue
            job.decode += done.decode / len(entries)
            job.put(entry.index, Image(pixels, settings, together), now)
            if job.over:
                del self._jobs[job.number]
        if len(set(done.together)) == 1 and done.together[0] == len(entries):
            acts = any(one.guidance.acts(one.schedule) for one in done.settings)
            work = Work.of(done.settings[0].schedule, acts, len(entries))
            self.costs = self.costs.observed(work, done.seconds)

    def _wanted(self, number: int) -> bool:
        return any(entry.job in self._jobs for entry in self._batches.get(number, ()))

    def _give_up(self, number: int, error: HTTPError) -> None:
        """Fail every job of a batch."""
        numbers = {entry.job for entry in self._batches.pop(number, ())}
        jobs = [self._jobs[number] for number in numbers if number in self._jobs]
        if error.status in (500, 503):
            log.error("a worker failed on these requests: %s", ", ".join(job.name for job in jobs) or "none that waits")
        for job in jobs:
            self._drop(job, error)
        self._cancel_unwanted()

    def _expire(self, now: float) -> None:
        for number in self.queue.expired(now):
            got = "The deadline passed while the request waited in the queue. Try again later, or allow more time."
            self._drop(self._jobs[number], HTTPError(504, got, "deadline_exceeded"))

    def _drop(self, job: Job, error: HTTPError) -> None:
        self._forget(job)
        job.fail(error)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.number, None)
        self.queue = self.queue.without({job.number})
        self.metrics.queued.set(len(self.queue))


def _end(worker: WorkerHandle) -> None:
    """Wait for the end of a lost worker, and log it."""
    running = worker.batch is not None
    worker.join(1.0)
    code = "" if worker.exit_code is None else f" with exit code {worker.exit_code}"
    log.warning("a worker has ended%s%s", code, " while it ran a batch" if running else "")


def _runs(together: Sequence[int]) -> list[int]:
    """The sizes of the runs that a batch was made of, from the size of each image's run."""
    sizes, i = [], 0
    while i < len(together):
        sizes.append(together[i])
        i += together[i]
    return sizes
