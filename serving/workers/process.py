"""A worker: it opens the bundle, warms up, and runs one batch after another.

`run` is the main function of a worker process. It also runs in a thread of the service.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import FlexVARError, FlexVARPipeline, InvalidInput, OutOfMemory, ScaleSchedule
from flexvar_runtime.editing.options import Edit
from flexvar_runtime.editing.plan import plan_edit
from flexvar_runtime.errors import DeviceFailed
from flexvar_runtime.generation.host import HostGenerator
from flexvar_runtime.memory.available import available_bytes
from flexvar_runtime.output import GenerationOutput, ScaleStep
from flexvar_runtime.pictures.photo import Photo, read_photo
from flexvar_runtime.request import Shape

from ..errors import HTTPError, internal
from ..schedules import Allowed, nearest_allowed
from .line import ConnectionEnded, Line
from .messages import (
    Batch,
    Beat,
    Cancel,
    Cancelled,
    Done,
    EditJob,
    Failed,
    Ping,
    Preview,
    Refused,
    Stop,
)
from .warmup import warm_up

if TYPE_CHECKING:
    from ..settings import ModelSettings

log = logging.getLogger(__name__)

Opener = Callable[["WorkerSetup"], FlexVARPipeline]


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What one worker opens, and where it runs."""

    model: ModelSettings
    device: str | None = None
    threads: int | None = None


class BatchCancelled(Exception):
    """Nobody waits for the batch."""


def open_pipeline(setup: WorkerSetup) -> FlexVARPipeline:
    model = setup.model
    return FlexVARPipeline.from_bundle(
        model.bundle,
        model.backend,
        setup.device,
        setup.threads,
        model.engines,
        allow_unproved=model.allow_unproved,
    )


def run(connection: Connection, setup: WorkerSetup, opener: Opener = open_pipeline) -> None:
    """Answer the messages of a connection until it ends, or until Stop."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all processes; the service decides
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    line = Line(connection)
    with suppress(ConnectionEnded), ExitStack() as stack:
        memory = available_bytes()
        try:
            pipeline = stack.enter_context(opener(setup))
            ready = warm_up(pipeline, setup.model)
        except Exception as error:
            line.send(Refused(error if isinstance(error, FlexVARError) else _sendable(error)))
            return
        line.send(ready)
        _Worker(pipeline, line, memory, setup.model.schedules).serve()


class _Worker:
    """The loop of a worker.

    memory: bytes that were available before the bundle was opened; None if unknown. schedules: see `ModelSettings`.
    """

    def __init__(
        self,
        pipeline: FlexVARPipeline,
        line: Line,
        memory: int | None,
        schedules: Allowed,
    ) -> None:
        self._pipeline, self._line, self._memory, self._schedules = pipeline, line, memory, schedules
        self._stopped = False

    def serve(self) -> None:
        while not self._stopped:
            self._receive()

    def _receive(self, running: int | None = None) -> None:
        """Handle one message. running: number of the batch that runs."""
        message = self._line.receive()
        match message:
            case Batch():
                self._line.send(self._answer(message))
            case Ping():
                self._line.send(Beat())
            case Cancel(number=number):
                if number == running:
                    raise BatchCancelled
            case Stop():
                self._stopped = True
                if running is not None:
                    raise BatchCancelled

    def _answer(self, batch: Batch) -> Done | Failed | Cancelled:
        try:
            return self._run(batch)
        except BatchCancelled:
            return Cancelled(batch.number)
        except ConnectionEnded:
            raise
        except Exception as error:
            self._stopped = isinstance(error, DeviceFailed)  # only a new process can use the GPU again
            return Failed(batch.number, _sendable(error), ends=self._stopped)

    def _run(self, batch: Batch) -> Done:
        """Run a batch. If it does not fit in memory, run its halves one after the other."""
        started = time.perf_counter()
        outputs = list(self._outputs(batch))
        return Done(
            number=batch.number,
            pixels=np.concatenate([output.images for output in outputs]),
            settings=tuple(one for output in outputs for one in output.settings),
            together=tuple(len(output.images) for output in outputs for _ in output.images),
            seconds=time.perf_counter() - started,
            decode=sum(output.timings.decode for output in outputs),
        )

    def _outputs(self, batch: Batch) -> Iterator[GenerationOutput]:
        try:
            yield self._edit(batch, batch.edit) if batch.edit is not None else self._generate(batch)
        except OutOfMemory as error:
            half = len(batch.items) // 2
            if half == 0 and self._never_fits(batch):
                raise HTTPError(413, str(error), "too_large", "size") from error
            if half == 0:
                raise
            for start, items in ((0, batch.items[:half]), (half, batch.items[half:])):
                yield from self._outputs(replace(batch, items=items, first=batch.first + start))

    def _never_fits(self, batch: Batch) -> bool:
        """Whether one image needs more memory than this machine had before the bundle was opened."""
        generator = self._pipeline.generator
        if self._memory is None or batch.schedule is None or not isinstance(generator, HostGenerator):
            return False
        guided = batch.items[0].guidance.acts(batch.schedule)
        return generator.memory_plan(Shape(batch.schedule, 1, guided)).needed() > self._memory

    def _generate(self, batch: Batch) -> GenerationOutput:
        items = batch.items
        return self._pipeline(
            [item.label for item in items],
            batch.schedule,
            [item.guidance for item in items],
            batch.sampling,
            seed=[item.seed for item in items],
            first_index=[item.index for item in items],
            on_scale=self._on_scale(batch),
        )

    def _edit(self, batch: Batch, job: EditJob) -> GenerationOutput:
        photo, mask = self._pictures(job)
        task = job.task or ("inpaint" if mask is not None or photo.opacity is not None else "refine")
        if task == "inpaint" and mask is None and photo.opacity is None:
            got = "task inpaint needs mask, or an image with transparency. Transparent pixels are repainted."
            raise HTTPError(400, got, "missing_value", "mask")
        items, model = batch.items, self._pipeline.model
        plan = plan_edit(
            Edit(**{**job.options, "task": task}),
            photo,
            mask,
            model,
            self._pipeline.schedule,
            batch.schedule,
            job.steps,
        )
        self._require_tokens(plan.schedule, batch.max_tokens)
        schedule = nearest_allowed(plan.schedule, job.steps, self._schedules, "image")
        return self._pipeline.edit(
            photo,
            task,
            mask=mask,
            labels=[item.label for item in items],
            schedule=schedule,
            guidance=[item.guidance for item in items],
            sampling=batch.sampling,
            seed=[item.seed for item in items],
            first_index=[item.index for item in items],
            on_scale=self._on_scale(batch),
            **job.options,
        )

    def _pictures(self, job: EditJob) -> tuple[Photo, NDArray[np.uint8] | None]:
        """The picture, and its mask with white where it is repainted. Raises HTTPError."""
        photo = _read("image", job.image)
        if job.mask is None:
            return photo, None
        mask = _read("mask", job.mask)
        if mask.opacity is None:
            raise HTTPError(
                400, "mask has no transparent pixels. Make the part to repaint transparent.", "invalid_value", "mask"
            )
        if mask.size != photo.size:
            sizes = "{}x{}, but image has {}x{} pixels".format(*mask.size[::-1], *photo.size[::-1])
            raise HTTPError(400, f"mask has {sizes}. Send a mask of the size of the image.", "invalid_value", "mask")
        return photo, 255 - mask.opacity

    def _require_tokens(self, schedule: ScaleSchedule, most: int | None) -> None:
        """Raise HTTPError if the schedule that an edit takes from its picture is too long."""
        if most is not None and schedule.tokens > most:
            got = f"The scales of the image have {schedule.tokens:,} tokens together, but this service allows {most:,}."
            raise HTTPError(413, f"{got} Ask for a smaller size or fewer steps.", "too_large", "size")

    def _on_scale(self, batch: Batch) -> Callable[[ScaleStep], None] | None:
        """What is called after every scale: it sends previews, shows that the worker is alive, and looks for Cancel.

        A GPU runs all scales in one call, so it can call this only if previews are asked for.
        """
        if self._pipeline.generator.runs_whole and not batch.previews:
            return None

        def on_scale(step: ScaleStep) -> None:
            while self._line.poll():
                self._receive(batch.number)
            if step.index in preview_scales(step.count, batch.previews):
                message = Preview(batch.number, batch.first, step.preview(), step.index, step.count, step.size)
                self._line.send(message)
            else:
                self._line.send(Beat())

        return on_scale


def preview_scales(scales: int, previews: int) -> tuple[int, ...]:
    """The indices of the scales to show, spread evenly over those before the last."""
    shown = min(previews, scales - 1)
    return tuple(-(-(i + 1) * scales // (shown + 1)) - 1 for i in range(shown))


def _read(field: str, content: bytes) -> Photo:
    """The picture in a field of the request. Raises HTTPError, OutOfMemory."""
    try:
        return read_photo(content)
    except OutOfMemory:
        raise
    except FlexVARError as error:
        got = error.got.replace("The picture", f"The file in {field}", 1)
        raise HTTPError(400, f"{got} {error.fix}", "invalid_image", field) from error


def _sendable(error: Exception) -> Exception:
    """An error that can be pickled. What the client is not at fault for is logged here."""
    if not isinstance(error, InvalidInput | OutOfMemory | HTTPError):
        log.error("a worker failed", exc_info=error)
    return error if isinstance(error, FlexVARError | HTTPError) else internal()
