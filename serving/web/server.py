"""The HTTP server: uvicorn, with limits on every connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flexvar_runtime.errors import EnvironmentFailed

from ..errors import HTTPError
from ..metrics import Metrics
from ..settings import Limits

KEEP_ALIVE_SECONDS = 30
_BACKLOG = 1024


class LimitedProtocol(HttpToolsProtocol):
    """One connection. It ends if a request does not arrive in time, or if nobody takes the answer.

    uvicorn itself waits for ever for a slow client.
    """

    limits: Limits
    metrics: Metrics

    _receiving: asyncio.TimerHandle | None = None
    _sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.metrics.rejected.labels("connections").inc()
            self._refuse(
                HTTPError(
                    503,
                    "Too many connections are open. Close idle ones, or try again in a second.",
                    "connections",
                    retry_after=1,
                )
            )
            return
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_receiving()
        self._cancel_sending()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._receiving is None and self._idle:
            self._expect_request()
        if self.parser is not None:
            super().data_received(data)

    def on_message_complete(self) -> None:
        self._cancel_receiving()
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._cancel_sending()
        self._sending = self.loop.call_later(self.limits.send_seconds, self._abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._cancel_sending()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._sending = self._sending or self.loop.call_later(self.limits.send_seconds, self._abort)

    def send_400_response(self, msg: str) -> None:
        self._refuse(HTTPError(400, "This is not a valid HTTP request.", "invalid_http"))

    @property
    def _idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_request(self) -> None:
        self._receiving = self.loop.call_later(self.limits.receive_seconds, self._late)

    def _late(self) -> None:
        self._receiving = None
        self.metrics.rejected.labels("receive_timeout").inc()
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self._abort()
            return
        seconds = f"{self.limits.receive_seconds:g}"
        self._refuse(
            HTTPError(408, f"The request did not arrive within {seconds} seconds. Send it faster.", "receive_timeout")
        )

    def _refuse(self, error: HTTPError) -> None:
        """Answer without the application, and close the connection."""
        if self.transport.is_closing():
            return
        body, status = error.body(), error.status
        phrase = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[status]
        headers = {**error.all_headers(), "content-length": str(len(body)), "connection": "close"}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {status} {phrase}\r\n{lines}\r\n".encode() + body)
        self.transport.close()
        self._sending = self._sending or self.loop.call_later(5.0, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    def _cancel_receiving(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _cancel_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


class Server(uvicorn.Server):
    """A server whose signals are handled by the service."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_server(app: ASGIApp, limits: Limits, metrics: Metrics) -> Server:
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
    import resource

    spare = 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted: Any = connections + spare
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - spare))
