"""Load on a service, by `flexvar bench load`: what is answered, what grows, and the processor time of a request.

Wall-clock times are printed, not asserted: machines are shared.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flexvar_bench.load import DEADLINE, QUEUE, ServedModel, aborted, beside_idle, overload, served, slow_loris, steady
from flexvar_bench.load_client import Address, closed_loop, generation

if TYPE_CHECKING:
    from http_client import Running

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
MEGABYTES = 50.0


@pytest.fixture(scope="module")
def service(tiny_bundle: Path) -> ServedModel:
    pytest.importorskip("fastapi")
    options = ["--workers", "2", "--threads", "1", "--queue", str(QUEUE), "--receive-timeout", str(DEADLINE)]
    with served(tiny_bundle, options) as running:
        yield running


def shown(values: dict[str, object]) -> dict[str, object]:
    print(json.dumps(values))
    return values


def test_many_clients(service: ServedModel) -> None:
    found = shown(steady(service, 64, 20.0, QUEUE))
    assert set(found["statuses"]) <= {"200", "429"} and found["statuses"]["200"] > 100
    assert found["growth_mb"] <= MEGABYTES


def test_three_times_too_much(service: ServedModel) -> None:
    rate = steady(service, 16, 3.0, QUEUE)["images_per_second"]
    found = shown(overload(service, rate, 3.0, 10.0))
    assert set(found["statuses"]) == {"200", "429"} and found["growth_mb"] <= MEGABYTES
    assert found["recovery_seconds"] is not None


def test_idle_and_slow_connections(service: ServedModel) -> None:
    found = shown(beside_idle(service, 500, 50, 4, 3.0, 2))
    assert set(found["statuses"]) <= {"200", "429"}


def test_no_slow_connection_is_left_after_the_deadline(service: ServedModel) -> None:
    found = shown(slow_loris(service, 200, DEADLINE))
    assert found["left_open"] == 0 and set(found["statuses"]) <= {"200", "429"}


def test_clients_that_close_at_random_moments(service: ServedModel) -> None:
    found = shown(aborted(service, 16, 30.0))
    assert found["aborted"] > 100 and set(found["statuses_afterwards"]) == {"200"}
    assert found["growth_mb"] <= MEGABYTES and found["files_after"] <= found["files_before"] + 8


def test_processor_time_of_a_request(start_stub: Callable[..., Running]) -> None:
    """At most 3 ms, with a stand-in model that takes next to nothing."""
    running = start_stub(layout={"in_thread": True}, limits={"queue": 256})
    model = ServedModel(Address(*running.address), running.process.pid, 1)

    def request(number: int) -> bytes:
        return generation(accept="application/json", class_id=0, seed=number)

    asyncio.run(closed_loop(model.address, 8, 1.0, request))
    before = model.processor_seconds
    done = asyncio.run(closed_loop(model.address, 8, 5.0, request))
    each = (model.processor_seconds - before) / len(done) * 1e3
    print(f"{each:.2f} ms of processor time a request")
    assert {one.status for one in done} == {200} and each <= 3.0
