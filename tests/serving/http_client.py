"""A small HTTP client for the tests, and a service in a process of its own."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURE, MASK = png(Image.new("RGB", (64, 64), "white")), png(Image.new("RGBA", (64, 64)))
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """The events of a stream."""
        found = []
        for block in self.body.decode().strip().split("\n\n"):
            kind, data = block.split("\n", 1)
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return found


@dataclass
class Running:
    """A service in a process. ready: what it printed."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.ready["url"])
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    @property
    def workers(self) -> list[int]:
        """The processes of the workers, which Python starts with spawn_main."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"spawn_main" in entry.joinpath("cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return sorted(found)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        connection = http.client.HTTPConnection(*self.address, timeout=timeout)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers=headers)

    def generate(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return self.request("POST", GENERATIONS, fields, headers)

    def edit(self, files: dict[str, bytes], headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        body, kind = form(files, fields)
        return self.request("POST", EDITS, body, {"content-type": kind, **(headers or {})})

    def metric(self, name: str) -> float:
        """The value of a metric, with its labels as Prometheus writes them."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def form(files: dict[str, bytes], fields: dict[str, Any]) -> tuple[bytes, str]:
    """A multipart body, and its content type."""
    edge, parts = "edge-of-a-part", []
    for name, value in fields.items():
        parts.append(f'--{edge}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    for name, content in files.items():
        head = f'--{edge}\r\ncontent-disposition: form-data; name="{name}"; filename="{name}.png"\r\n\r\n'
        parts.append(head.encode() + content + b"\r\n")
    return b"".join([*parts, f"--{edge}--\r\n".encode()]), f"multipart/form-data; boundary={edge}"


def started(command: list[str], environ: dict[str, str] | None = None) -> Running:
    """Start a service that prints one JSON line when it is ready. Its standard error is kept."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environ or {})}
    )
    assert process.stdout and process.stderr
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    line = process.stdout.readline()
    if not line:
        process.wait(10)
        reader.join(5)
        raise AssertionError(f"the service ended with {process.returncode}: {''.join(log)}")
    return Running(process, json.loads(line), log)


def stub(**settings: Any) -> Running:
    """A service with the stand-in model."""
    program = Path(__file__).with_name("stub_service.py")
    return started([sys.executable, str(program), json.dumps(settings)])


def flexvar_serve(bundle: Path, *options: str) -> Running:
    program = Path(sys.executable).parent / "flexvar"
    return started([str(program), "serve", str(bundle), "--port", "0", "--json", *options])


def connect(running: Running) -> socket.socket:
    """A connection of which nothing has been sent yet."""
    found = socket.create_connection(running.address, timeout=20)
    found.settimeout(20)
    return found


def until(holds: Callable[[], bool], seconds: float = 15) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
