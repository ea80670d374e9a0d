"""What is recorded of every request: an id, a line in the log, and metrics."""

from __future__ import annotations

import json
import logging
import queue
import re
import secrets
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..metrics import Metrics

log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
CLIENT_GONE = 499
"""The status in the log and the metrics where the client closed the connection before the answer."""


@dataclass
class Record:
    """One request. values: further entries of its log line. gone: whether the client closed the connection.
    status: of a stream that failed after its head was sent."""

    request_id: str
    traceparent: str | None
    values: dict[str, Any] = field(default_factory=dict)
    gone: bool = False
    status: int | None = None


def record_of(scope: Scope) -> Record:
    record: Record = scope["state"]["record"]
    return record


class AccessLog:
    """Writes one JSON line for each request. It writes in a thread, so that a slow reader of the log stops nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(10_000)
        self._writer = threading.Thread(target=self._write, name="flexvar-log", daemon=True)
        self._writer.start()

    def put(self, values: dict[str, Any]) -> None:
        """Log a request. The line is dropped if 10,000 lines wait."""
        if not self._lines.full():
            self._lines.put(json.dumps(values))

    def close(self) -> None:
        with suppress(queue.Full):  # nobody reads the log; the thread ends with the process
            self._lines.put_nowait(None)
            self._writer.join(2)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            stream = self._stream or sys.stderr
            try:
                stream.write(f"{line}\n")
                stream.flush()
            except (OSError, ValueError):  # a full disk, or a stream that is closed
                continue


class Observed:
    """ASGI middleware: gives each request an id, and writes its log line and its metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: AccessLog) -> None:
        self._app, self._metrics, self._log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given, started, status = Headers(scope=scope), time.monotonic(), 0
        wanted, trace = given.get("x-request-id", ""), given.get("traceparent", "")
        request_id = wanted if _ID.fullmatch(wanted) else secrets.token_hex(16)
        record = Record(request_id, trace if _TRACE.fullmatch(trace) else None)
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                if record.traceparent is not None:
                    headers["traceparent"] = record.traceparent
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:
            log.error("request %s failed", record.request_id, exc_info=error)  # the application has answered 500
        finally:
            shown = CLIENT_GONE if record.gone else record.status or status or 500
            self._observe(scope, record, shown, time.monotonic() - started)

    def _observe(self, scope: Scope, record: Record, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, _method(scope), str(status)).inc()
        self._metrics.request.labels(route).observe(seconds)
        client = scope.get("client") or ("", 0)
        self._log.put(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "request_id": record.request_id,
                "client": client[0],
                "method": _method(scope),
                "path": scope["path"][:200],
                "status": status,
                "ms": round(seconds * 1e3, 1),
                **({} if record.traceparent is None else {"trace_id": record.traceparent.split("-")[1]}),
                **record.values,
            }
        )


def _method(scope: Scope) -> str:
    """The method, or "other" for one that no client needs: labels of metrics must be few."""
    known = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
    return scope["method"] if scope["method"] in known else "other"
