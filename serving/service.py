"""Runs a service: workers, application and server from start to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.machine.processors import default_threads

from .images.answers import Encoder
from .images.model import Model
from .metrics import Metrics
from .scheduling.dispatcher import Dispatcher
from .settings import ServiceSettings
from .web.application import create_application
from .web.bodies import UploadSpace
from .web.keys import Keys
from .web.observing import AccessLog
from .web.server import Server, create_server, raise_file_limit
from .web.state import Service
from .workers.process import Opener, open_pipeline

log = logging.getLogger(__name__)

_MOST_ENCODERS = 4
_LAST_ANSWERS = 0.1
"""Seconds in which requests that were dropped are still answered."""


async def serve(
    settings: ServiceSettings,
    listener: socket.socket,
    *,
    on_ready: Callable[[Service], None] = lambda service: None,
    opener: Opener = open_pipeline,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the signal. on_ready: called when requests are taken.

    Requests that were accepted are finished first. A second signal ends them, and then SIGINT is returned. Raises
    FlexVARError if a worker cannot open the bundle, or if workers keep dying.
    """
    limits = replace(settings.limits, connections=raise_file_limit(settings.limits.connections))
    metrics, access_log = Metrics(), AccessLog()
    executor = ThreadPoolExecutor(min(_MOST_ENCODERS, default_threads()), thread_name_prefix="flexvar-encode")
    dispatcher = Dispatcher(settings, metrics, opener)
    service = Service(
        dispatcher=dispatcher,
        metrics=metrics,
        encoder=Encoder(executor, metrics.encode.observe),
        limits=limits,
        keys=Keys(settings.keys),
        uploads=UploadSpace(limits.uploads_bytes),
        access_log=access_log,
    )
    server = create_server(create_application(service), limits, metrics)
    signals = _Signals(server)
    watching = asyncio.create_task(dispatcher.watch())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        starting = asyncio.create_task(_open(service, settings))
        await _first(starting, signals.first, serving)
        if starting.done():
            starting.result()
            on_ready(service)
            await _first(signals.first, dispatcher.pool.failed, serving)
        else:
            starting.cancel()
        if signals.first.done() and not dispatcher.pool.failed.done():
            await _drain(service, server, settings.drain_delay)
        server.should_exit = True
        server.force_exit |= dispatcher.pool.failed.done()
        await serving
        if dispatcher.pool.failed.done():
            dispatcher.pool.failed.result()
        return signal.SIGINT if signals.second or not signals.first.done() else signals.first.result()
    finally:
        server.should_exit = server.force_exit = True
        dispatcher.drop_all()
        with suppress(Exception):
            await serving
        await asyncio.sleep(_LAST_ANSWERS)
        watching.cancel()
        await dispatcher.pool.stop()
        executor.shutdown(wait=False, cancel_futures=True)
        access_log.close()
        signals.restore()


async def _open(service: Service, settings: ServiceSettings) -> None:
    """Wait for the workers, and take the facts of the model from them."""
    ready = await service.dispatcher.pool.start()
    model = Model.of(settings.name, ready.manifest, settings.model.schedules, settings.limits.max_tokens)
    least = model.start.schedule.tokens
    if least > model.max_tokens:
        got = f"--max-tokens is {model.max_tokens}, but an image of the default schedule has {least}."
        raise InvalidInput(got, expected="at least that many", fix="Pass a larger number, or --schedules.")
    service.model = model
    service.opened = time.time()
    service.metrics.describe(ready.bundle, ready.backend, str(ready.manifest.precision))


async def _drain(service: Service, server: Server, delay: float) -> None:
    """Say that the service is not ready, and go on accepting requests for `delay` seconds.

    So a load balancer notices before connections are refused.
    """
    service.draining = True
    log.info("stopping: the accepted requests are being finished")
    end = time.monotonic() + delay
    while time.monotonic() < end and not server.force_exit and not service.dispatcher.pool.failed.done():
        await asyncio.sleep(0.05)


async def _first(*waiting: asyncio.Future[object] | asyncio.Future[int] | asyncio.Future[None]) -> None:
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


class _Signals:
    """SIGTERM and SIGINT. first: the first that came. The second one ends the server without waiting for requests."""

    def __init__(self, server: Server) -> None:
        self._loop, self._server = asyncio.get_running_loop(), server
        self.first: asyncio.Future[int] = self._loop.create_future()
        self.second = False
        self._numbers = (signal.SIGTERM, signal.SIGINT)
        for number in self._numbers:
            self._loop.add_signal_handler(number, self._came, number)

    def _came(self, number: int) -> None:
        if not self.first.done():
            self.first.set_result(number)
            return
        self.second = self._server.should_exit = self._server.force_exit = True

    def restore(self) -> None:
        for number in self._numbers:
            self._loop.remove_signal_handler(number)
