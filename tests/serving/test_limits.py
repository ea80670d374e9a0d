"""Every limit of the service refuses with its status, its code and its line in the metrics."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from http_client import MASK, PICTURE, connect, until

if TYPE_CHECKING:
    from http_client import Running

HEAD = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
Start = Callable[..., "Running"]


def read_to_end(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_a_large_json_body(stub_service: Running) -> None:
    answer = stub_service.request("POST", "/v1/images/generations", b" " * 20_000, {"content-type": "application/json"})
    assert answer.status == 413 and answer.error["code"] == "body_too_large"


def test_a_large_chunked_body(stub_service: Running) -> None:
    with connect(stub_service) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(5):
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


def test_a_large_edit(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"edit_bytes": 1000})
    answer = running.edit({"image": PICTURE + bytes(2000)})
    assert answer.status == 413 and answer.error["code"] == "body_too_large"
    assert running.edit({"image": PICTURE}, prompt="plain", task="refine").status == 200


def test_memory_for_uploads(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"uploads_bytes": 3000})
    with connect(running) as holder:
        head = HEAD.replace(b"generations", b"edits").replace(b"application/json", b"multipart/form-data; boundary=x")
        holder.sendall(head + b"content-length: 2000\r\n\r\n")
        time.sleep(0.2)
        full = running.edit({"image": PICTURE + bytes(1500)}, prompt="plain", task="refine")
        assert full.status == 429 and full.error["code"] == "uploads_full" and full.headers["retry-after"]
    until(lambda: running.edit({"image": PICTURE + bytes(1500)}, prompt="plain", task="refine").status == 200)


def test_a_full_queue(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"queue": 2}, model={"batch_sizes": [1]})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: running.generate(prompt="slow"), range(8)))
    refused = [answer for answer in answers if answer.status == 429]
    assert {answer.status for answer in answers} == {200, 429} and len(refused) >= 3
    for answer in refused:
        assert answer.error["code"] == "queue_full" and answer.error["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) >= 1
    assert running.metric('flexvar_rejected_total{reason="queue_full"}') == len(refused)
    assert running.generate(prompt="plain", n=3).status == 400  # more than the queue ever holds
    assert running.generate(prompt="plain", n=2).status == 200


def test_deadlines_in_a_queue(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, model={"batch_sizes": [1]})
    assert running.generate(prompt="slow").status == 200  # so that the cost is known
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(running.generate, prompt="slow") for _ in range(6)]
        until(lambda: running.metric("flexvar_queue_images") >= 4)
        late = running.generate({"x-flexvar-deadline-ms": "250"}, prompt="plain")
        assert late.status == 429 and late.error["code"] == "deadline_unreachable"
        assert {job.result().status for job in busy} == {200}


def test_tokens_and_schedules(start_stub: Start, stub_service: Running) -> None:
    answer = stub_service.generate(prompt="plain", size="160x160")
    assert answer.status == 413 and answer.error["code"] == "too_large"
    assert "The largest square is 128x128." in answer.error["message"]
    running = start_stub(layout={"in_thread": True}, limits={"max_tokens": 30})
    assert running.generate(prompt="plain").status == 200
    assert running.generate(prompt="plain", schedule="1_2_3_4_4").status == 413
    with pytest.raises(AssertionError, match="ended with 2: error: --max-tokens is 20"):
        start_stub(layout={"in_thread": True}, limits={"max_tokens": 20})  # every request would be refused


def test_keys(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, keys=["a-long-enough-key"])
    refused = running.generate(prompt="plain")
    assert refused.status == 401 and refused.error["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer a-long-enough-kez", "Basic a-long-enough-key", "a-long-enough-key", "Bearer"):
        assert running.generate({"authorization": wrong}, prompt="plain").status == 401
    assert running.get("/v1/models").status == 401 and running.edit({"image": PICTURE}).status == 401
    assert running.generate({"authorization": "Bearer a-long-enough-key"}, prompt="plain").status == 200
    assert {running.get(path).status for path in ("/", "/health/live", "/health/ready", "/metrics")} == {200}


def test_requests_that_do_not_arrive(start_stub: Start) -> None:
    """Nothing, half a head, half a body, and blank lines: all are ended at the deadline."""
    running = start_stub(layout={"in_thread": True}, limits={"receive_seconds": 1.0})
    starts = [b"", HEAD, HEAD + b'content-length: 40\r\n\r\n{"prompt"', b"\r\n"]
    connections = [connect(running) for _ in starts]
    begun = time.monotonic()
    for connection, start in zip(connections, starts, strict=True):
        connection.sendall(start)
    while time.monotonic() < begun + 0.8:
        connections[3].sendall(b"\r\n")
        time.sleep(0.1)
    answers = [read_to_end(connection) for connection in connections]
    assert time.monotonic() < begun + 10
    for answer in answers:
        assert answer.startswith(b"HTTP/1.1 408 ") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert running.metric('flexvar_rejected_total{reason="receive_timeout"}') == 4
    until(lambda: running.metric('flexvar_cancelled_total{stage="receiving"}') == 1)


def test_a_request_may_be_slow_within_the_deadline(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"receive_seconds": 5.0})
    body = b'{"prompt": "plain"}'
    with connect(running) as connection:
        for byte in (HEAD + b"content-length: %d\r\n\r\n" % len(body), body[:5], body[5:]):
            connection.sendall(byte)
            time.sleep(0.2)
        assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]


def open_files(running: Running) -> int:
    return len(os.listdir(f"/proc/{running.process.pid}/fd"))


def ask_for_much(running: Running) -> socket.socket:
    """A connection on which 12 MB will be sent, more than the system keeps for it."""
    body = json.dumps({"prompt": "noise", "schedule": "1_128"}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.settimeout(20)
    connection.connect(running.address)
    connection.sendall(HEAD + b"accept: image/png\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return connection


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.serving)])
def test_an_answer_that_nobody_takes(start_stub: Start, seconds: float) -> None:
    """Its connection ends at the limit, and not before. Then the service can stop."""
    running = start_stub(layout={"in_thread": True}, limits={"send_seconds": seconds, "max_tokens": 20_000})
    before = open_files(running)
    with ask_for_much(running):
        until(lambda: running.metric("flexvar_encode_seconds_count") == 1)
        if seconds > 1:
            time.sleep(3)
            assert open_files(running) == before + 1
            return
        until(lambda: open_files(running) == before)
        assert running.stop(timeout=10) == 0


def test_an_answer_that_is_read_slowly(start_stub: Start) -> None:
    """It takes longer than `send_seconds`, but some of it goes all the time."""
    running = start_stub(layout={"in_thread": True}, limits={"send_seconds": 1.0, "max_tokens": 20_000})
    with ask_for_much(running) as connection:
        parts, end = [connection.recv(4096)], time.monotonic() + 3
        while part := connection.recv(4096):
            parts.append(part)
            time.sleep(0.01 if time.monotonic() < end else 0)
            if len(part) < 4096 and sum(map(len, parts)) > 12 * 2**20:
                break
    assert sum(map(len, parts)) > 12 * 2**20


def test_a_request_that_begins_behind_another_one(start_stub: Start) -> None:
    """In one packet: a whole request, and half of the next, which ends at the deadline."""
    running = start_stub(layout={"in_thread": True}, limits={"receive_seconds": 1.0, "uploads_bytes": 3000})
    edit = HEAD.replace(b"generations", b"edits").replace(b"application/json", b"multipart/form-data; boundary=x")
    half = edit + b"content-length: 2000\r\n\r\n--x\r\ncontent-disposition: form-data"
    with connect(running) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n" + half)
        answer = read_to_end(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 1 and answer.count(b"HTTP/1.1 408 ") == 1
    until(lambda: running.edit({"image": PICTURE + bytes(1500)}, prompt="plain", task="refine").status == 200)


def test_a_refusal_before_the_body_came(start_stub: Start) -> None:
    """The connection ends at the deadline, without a second answer."""
    running = start_stub(layout={"in_thread": True}, limits={"receive_seconds": 1.0}, keys=["a-long-enough-key"])
    with connect(running) as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\nabc")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 401 ") and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("head", [b"x: " + b"y" * 80_000, b"a:b\r\n" * 20_000, b"GET /" + b"z" * 80_000])
def test_a_long_head(stub_service: Running, head: bytes) -> None:
    with connect(stub_service) as connection:
        connection.sendall(head if head.startswith(b"GET") else HEAD + head)
        assert read_to_end(connection).startswith(b"HTTP/1.1 431 ")


def test_many_requests_behind_another_one(start_stub: Start) -> None:
    """They do not pile up, and the service goes on."""
    running = start_stub(layout={"in_thread": True})
    with connect(running) as connection, suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 100_000)
        read_to_end(connection)
    assert running.get("/health/live").status == 200
    assert running.metric('flexvar_requests_total{method="GET",route="/",status="200"}') < 1000


def test_a_client_that_offers_http_2(stub_service: Running) -> None:
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAEAAEAAAAIAAAAA"}
    assert stub_service.generate(offer, prompt="plain").status == 200


def test_streams_hold_their_uploads(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"uploads_bytes": 4000}, model={"batch_sizes": [1]})
    with ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(running.edit, {"image": PICTURE}, prompt="slow", task="refine", stream="true", user="x" * 150)
            for _ in range(12)
        ]
        statuses = {job.result().status for job in jobs}
    assert statuses == {200, 429}
    until(lambda: running.edit({"image": PICTURE + bytes(3000)}, prompt="plain", task="refine").status == 200)


def test_a_deadline_that_passes_in_the_queue(start_stub: Start) -> None:
    running = start_stub(model={"batch_sizes": [1]})
    running.generate(prompt="plain")
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(running.generate, prompt="long")  # it takes much longer than forecast
        until(lambda: running.metric("flexvar_queue_seconds_count") == 2)
        late = running.generate({"x-flexvar-deadline-ms": "300"}, prompt="plain")
        assert late.status == 504 and late.error["code"] == "deadline_exceeded"
        assert busy.result().status == 200
    assert running.metric('flexvar_rejected_total{reason="deadline_exceeded"}') == 1


def test_connections(start_stub: Start) -> None:
    running = start_stub(layout={"in_thread": True}, limits={"connections": 3})
    idle = [connect(running) for _ in range(3)]
    time.sleep(0.2)
    with connect(running) as one_more:
        answer = read_to_end(one_more)
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"connections"' in answer
    for connection in idle:
        connection.close()
    until(lambda: running.generate(prompt="plain").status == 200)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x00\x05hello",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nxyz",
    ],
)
def test_what_is_not_http(stub_service: Running, sent: bytes) -> None:
    with connect(stub_service) as connection:
        connection.sendall(sent)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"error"' in answer
    assert stub_service.get("/health/live").status == 200


def test_no_name_of_a_request_becomes_a_path(stub_service: Running, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(MASK)
    for name in (str(secret), f"file://{secret}", "../../etc/passwd"):
        assert stub_service.generate(prompt=name).status == 400
        assert stub_service.generate(prompt="plain", preset=name[:100]).status == 400
        assert stub_service.edit({"image": name.encode()}, prompt="plain").status == 400
        assert stub_service.get(f"/{name}").status == 404


def test_pages_of_other_sites(stub_service: Running) -> None:
    """A browser sends a form to any address. It says where the page comes from."""
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        answer = stub_service.edit({"image": PICTURE}, {"sec-fetch-site": site}, prompt="plain", task="refine")
        assert answer.status == status
