"""Services that the tests share, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from http_client import Running


@pytest.fixture(scope="session")
def stub_service() -> Iterator[Running]:
    """The stand-in model in a thread of the service."""
    pytest.importorskip("fastapi")
    from http_client import stub

    running = stub(layout={"in_thread": True}, limits={"queue": 16})
    yield running
    assert running.stop() == 0


@pytest.fixture
def start_stub() -> Iterator[Callable[..., Running]]:
    """Starts a stand-in with settings of its own. It is stopped at the end."""
    pytest.importorskip("fastapi")
    from http_client import stub

    started: list[Running] = []

    def start(**settings: Any) -> Running:
        started.append(stub(**settings))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait(10)


@pytest.fixture(scope="session")
def tiny_service(tiny_bundle: Path) -> Iterator[Running]:
    """The tiny model in two worker processes."""
    pytest.importorskip("fastapi")
    from http_client import flexvar_serve

    running = flexvar_serve(tiny_bundle, "--workers", "2", "--threads", "1")
    yield running
    assert running.stop() == 0
