"""Brings jobs and workers together: forms batches, and hands out their images."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from flexvar_runtime import ScaleSchedule

from ..errors import HTTPError, of_worker, worker_lost
from ..metrics import Metrics
from ..settings import ServiceSettings
from ..workers.handle import WorkerHandle
from ..workers.messages import Batch, Cancelled, Done, Failed, Preview, Ready
from ..workers.pool import Pool
from ..workers.process import Opener, open_pipeline
from .costs import Costs, Work
from .jobs import Job
from .orders import Image, Order, Scale
from .queue import Entry, Queue

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5


class Dispatcher:
    """The queue, the jobs and the batches of a service. All methods run in the event loop."""

    def __init__(self, settings: ServiceSettings, metrics: Metrics, opener: Opener = open_pipeline) -> None:
        self.metrics, self.queue, self.costs = metrics, Queue(settings.limits.queue), Costs()
        self.pool = Pool(settings, self, opener)
        self._sizes = settings.model.batch_sizes
        self._jobs: dict[int, Job] = {}
        self._batches: dict[int, tuple[Entry, ...]] = {}
        self._numbers = itertools.count(1)

    async def watch(self) -> None:
        """Expire deadlines and look after the workers, for ever."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            self.metrics.lag.observe(max(0.0, now - before - WATCH_SECONDS))
            self._expire(now)
            self.pool.check(now)

    def worker_ready(self, ready: Ready) -> None:
        if not self.costs.known:
            for schedule, guided, images, seconds in ready.measured:
                self.costs = self.costs.observed(Work.of(schedule, guided, images), seconds)
        self._dispatch()

    def worker_said(self, worker: WorkerHandle, message: Any) -> None:
        match message:
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

    def worker_lost(self, worker: WorkerHandle) -> None:
        self.metrics.restarts.inc()
        if worker.batch is not None:
            self._give_up(worker.batch.number, worker_lost())

    def drop_all(self) -> None:
        """Fail every job, because the service ends."""
        error = HTTPError(503, "The service is stopping. Send the request again.", "stopping", retry_after=5)
        for job in list(self._jobs.values()):
            self._drop(job, error)

    def submit(self, order: Order, deadline: float | None, name: str) -> Job:
        """Put an order in the queue. deadline: on time.monotonic. name: for the log. Raises HTTPError if there is no
        room."""
        if not self.pool.ready:
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
        for worker in self.pool.busy:
            if worker.batch is not None and not self._wanted(worker.batch.number):
                worker.cancel()

    def forecast(self, order: Order) -> float:
        """Seconds until a worker would begin with an order."""
        now, workers = time.monotonic(), max(1, len(self.pool.workers))
        running = sum(max(0.0, worker.expected - (now - worker.started)) for worker in self.pool.busy)
        if self.pool.idle and not len(self.queue):
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
            sizes.append(max(size for size in self._sizes if size <= images))
            images -= sizes[-1]
        return sizes

    def _dispatch(self) -> None:
        """Give every idle worker a batch."""
        self._expire(time.monotonic())
        for worker in self.pool.idle:
            entries, self.queue = self.queue.next_batch(time.monotonic(), self._sizes)
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
                job.scales.put_nowait(Scale(pixels, preview.scale, preview.scales, preview.size))

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


def _runs(together: Sequence[int]) -> list[int]:
    """The sizes of the runs that a batch was made of, from the size of each image's run."""
    sizes, i = [], 0
    while i < len(together):
        sizes.append(together[i])
        i += together[i]
    return sizes
