"""A clock without time."""

from __future__ import annotations

from collections.abc import Callable

import pytest


class Clock:
    """time.perf_counter and time.sleep without time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Give modules a clock in place of `time`. Returns the clock."""

    def replaced(*modules: object) -> Clock:
        clock = Clock()
        for module in modules:
            monkeypatch.setattr(module, "time", clock)
        return clock

    return replaced
