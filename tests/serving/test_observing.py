"""The log of requests."""

from __future__ import annotations

import io
import json
import threading

import pytest

pytest.importorskip("fastapi")

from flexvar_serving.web.observing import AccessLog


class Stuck(io.StringIO):
    """A stream whose reader has stopped reading."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.go_on.wait(30)
        return super().write(text)


def test_lines_are_written_in_order() -> None:
    stream = io.StringIO()
    log = AccessLog(stream)
    for number in range(100):
        log.put({"number": number, "path": "/\n{forged}"})
    log.close()
    lines = stream.getvalue().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(100))


def test_a_log_that_nobody_reads_stops_nothing() -> None:
    """Lines are dropped, and `close` returns."""
    stream = Stuck()
    log = AccessLog(stream)
    for number in range(12_000):
        log.put({"number": number})
    log.close()
    stream.go_on.set()
