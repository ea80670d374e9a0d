"""A job: an order from the moment when it is accepted to its last image."""

from __future__ import annotations

import asyncio

from .orders import Image, Order, Scale, Spent
from .queue import Entry


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
