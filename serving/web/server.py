"""The HTTP server: uvicorn, with limits on every connection."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import resource
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flexvar_runtime.errors import EnvironmentFailed

from ..errors import HTTPError
from ..metrics import Metrics
from ..settings import Limits

KEEP_ALIVE_SECONDS = 30
_BACKLOG = 1024
_MOST_HEAD_BYTES = 64 * 1024
_HEADER_BYTES = 64
"""What a header counts besides its text, because many short ones take memory too."""
_MOST_PIPELINED = 8
_LEAST_READ = 16 * 1024
_OTHER_FILES = 256
"""Files that may be open besides the connections."""
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)


class LimitedProtocol(HttpToolsProtocol):
    """One connection, within the limits of the service. uvicorn itself waits for ever for a slow client.

    A request must arrive within `receive_seconds`, its head must be short, and few requests may wait behind another.
    A client must read its answer: every `send_seconds`, some of it must have gone.
    """

    limits: Limits
    metrics: Metrics

    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None
    _unsent = 0
    _head_bytes = 0
    _in_head = _in_message = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            text = "Too many connections are open. Close idle ones, or try again in a second."
            self._refuse(HTTPError(503, text, "connections", retry_after=1))
            return
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._receiving = _stopped(self._receiving)
        self._sending = _stopped(self._sending)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():
            return
        if not self._in_message:
            data = _without_upgrade(data)
            self._expect_request()  # also for blank lines, which begin no request
        super().data_received(data)
        self._head_bytes += len(data) if self._in_head else 0
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._in_message = self._in_head = True
        self._head_bytes = 0
        self._expect_request()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _HEADER_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if len(self.pipeline) >= _MOST_PIPELINED:
            raise ValueError("too many requests wait on this connection")  # becomes a call of send_400_response
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        self._receiving = _stopped(self._receiving)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_sending()

    def pause_writing(self) -> None:
        self._watch_sending()
        super().pause_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_sending()

    def send_400_response(self, msg: str) -> None:
        if self._head_bytes > _MOST_HEAD_BYTES:
            text = f"The head of the request is longer than {_MOST_HEAD_BYTES // 1024} KiB."
            self._refuse(HTTPError(431, text, "head_too_large"))
        else:
            self._refuse(HTTPError(400, "This is not a valid HTTP request.", "invalid_http"))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > _MOST_HEAD_BYTES:
            raise ValueError("the head is too long")  # becomes a call of send_400_response

    @property
    def _answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not (self.cycle.response_complete and not self.pipeline)

    def _expect_request(self) -> None:
        if self._receiving is None:
            self._receiving = self.loop.call_later(self.limits.receive_seconds, self._late)

    def _late(self) -> None:
        self._receiving = None
        if self._answering and not self._in_message:
            return  # only blank lines came behind a request that has arrived
        text = f"The request did not arrive within {self.limits.receive_seconds:g} seconds. Send it faster."
        error = HTTPError(408, text, "receive_timeout")
        in_body = self._in_message and not self._in_head
        if in_body and self.cycle.response_complete:  # it was refused before its body came
            self.transport.close()
            self._watch_sending()
        elif in_body and not self.cycle.response_started and not self.pipeline:
            self._refuse(error, answering=True)
        else:
            self._refuse(error)

    def _refuse(self, error: HTTPError, *, answering: bool = False) -> None:
        """Answer without the application, and close the connection. answering: the answer is to the request that the
        application waits for. Without it, a connection on which another answer is under way is closed without one."""
        if self.transport.is_closing():
            return
        self.metrics.rejected.labels(error.code).inc()
        if self._answering and not answering:
            self.transport.abort()
            return
        body = error.body()
        headers = {**error.all_headers(), "content-length": str(len(body)), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        phrase = HTTPStatus(error.status).phrase
        self.transport.write(f"HTTP/1.1 {error.status} {phrase}\r\n{lines}\r\n".encode() + body)
        self.transport.close()
        self._watch_sending()

    def _watch_sending(self) -> None:
        """While something is not sent, see to it that the client reads."""
        if self._sending is None and self.transport.get_write_buffer_size():
            self._unsent = _unsent_bytes(self.transport)
            self._sending = self.loop.call_later(self.limits.send_seconds, self._check_sending)

    def _check_sending(self) -> None:
        self._sending = None
        if self.transport.get_write_buffer_size() and _unsent_bytes(self.transport) > self._unsent - _LEAST_READ:
            self.transport.abort()
        else:
            self._watch_sending()


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, after a timer was stopped."""
    if timer is not None:
        timer.cancel()
    return None


def _unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not taken: those that wait here, and those that the system holds."""
    with suppress(OSError, ValueError):
        held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)
    return transport.get_write_buffer_size()


def _without_upgrade(data: bytes) -> bytes:
    """The beginning of a request without an Upgrade header, which a server may ignore. Clients that offer HTTP/2 send
    it, and the parser would stop at it."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head) + end + rest


class Server(uvicorn.Server):
    """A server whose signals are handled by the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_server(app: ASGIApp, limits: Limits, metrics: Metrics) -> Server:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the service has a log of its own
    protocol = type("Protocol", (LimitedProtocol,), {"limits": limits, "metrics": metrics})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        backlog=_BACKLOG,
        proxy_headers=False,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. port 0 takes a free one. Raises EnvironmentFailed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(_BACKLOG)
        except OSError:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such name"
        got = f"--host {host} --port {port} cannot be used ({reason})."
        fix = "Choose another port, such as --port 0 for a free one, or another host."
        raise EnvironmentFailed(got, expected="a free address", fix=fix) from error
    return found


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def raise_file_limit(connections: int) -> int:
    """Raise the limit of open files to what the connections need. Returns how many connections the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - _OTHER_FILES))
