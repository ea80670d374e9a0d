"""Clients of a service, for load: many connections in one event loop, and little work for each request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """One answered request. status 0: the connection broke. started: on time.monotonic. seconds: until the whole
    answer was there."""

    status: int
    started: float
    seconds: float
    images: int = 1


@dataclass(frozen=True)
class Address:
    host: str
    port: int


def generation(accept: str = "image/png", **fields: Any) -> bytes:
    """The bytes of a request for one picture, or for what `accept` names."""
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\n"
        f"accept: {accept}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """A connection that is opened again when the service closes it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> Request:
        started = time.monotonic()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(self._address.host, self._address.port, limit=2**24)
            reader, writer = self._streams
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            fields = head.lower()
            if b"transfer-encoding: chunked" in fields:
                await reader.readuntil(b"\r\n0\r\n\r\n")
            else:
                await reader.readexactly(int(fields.partition(b"content-length:")[2].partition(b"\r\n")[0]))
            if b"connection: close" in fields:
                self.close()
            return Request(int(head[9:12]), started, time.monotonic() - started)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            self.close()
            return Request(0, started, time.monotonic() - started)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed_loop(address: Address, clients: int, seconds: float, request: Callable[[int], bytes]) -> list[Request]:
    """Each client sends a request when its last one is answered, for some seconds. A client that is refused waits a
    little. request: the bytes of the n-th request."""
    end, count, done = time.monotonic() + seconds, 0, list[Request]()

    async def one() -> None:
        nonlocal count
        client = Client(address)
        while time.monotonic() < end:
            count += 1
            done.append(await client.send(request(count)))
            if done[-1].status != 200:
                await asyncio.sleep(0.1)
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return done


async def open_loop(address: Address, rate: float, seconds: float, request: Callable[[int], bytes]) -> list[Request]:
    """Requests at a fixed rate, each on a connection of its own, whether earlier ones are answered or not."""
    started, tasks = time.monotonic(), list[asyncio.Task[Request]]()

    async def one(number: int) -> Request:
        client = Client(address)
        try:
            return await client.send(request(number))
        finally:
            client.close()

    while (now := time.monotonic()) < started + seconds:
        while len(tasks) < (now - started) * rate:
            tasks.append(asyncio.create_task(one(len(tasks))))
        await asyncio.sleep(0.01)
    return list(await asyncio.gather(*tasks))


async def hold(address: Address, connections: int, start: bytes, byte: bytes, pause: float, seconds: float) -> int:
    """Open connections that send `start`, then one `byte` after every `pause`. Returns how many the service closed
    within `seconds`."""
    end, closed = time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal closed
        try:
            reader, writer = await asyncio.open_connection(address.host, address.port)
        except OSError:
            closed += 1
            return
        try:
            if start:
                writer.write(start)
            while (left := end - time.monotonic()) > 0:
                gone = asyncio.create_task(reader.read(65536))
                if await _first(gone, min(pause, left)):
                    closed += 1
                    return
                if byte:
                    writer.write(byte)
        finally:
            writer.close()

    async def _first(gone: asyncio.Task[bytes], pause: float) -> bool:
        """Whether the connection ended within a pause."""
        done, _ = await asyncio.wait({gone}, timeout=pause)
        if done:
            with suppress(OSError):
                gone.result()
            return True
        gone.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await gone
        return False

    await asyncio.gather(*(one() for _ in range(connections)))
    return closed


async def meanwhile(background: Awaitable[int], work: Awaitable[list[Request]]) -> tuple[list[Request], int]:
    """Both at once: the requests of `work`, and what `background` returns."""
    count, done = await asyncio.gather(background, work)
    return done, count
