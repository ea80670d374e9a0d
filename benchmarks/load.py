"""Load on a service: its throughput beside the bare pipeline, and what happens when there is too much of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.errors import EnvironmentFailed

from .load_client import Address, Client, Request, closed_loop, generation, hold, meanwhile, open_loop
from .timing import quantiles

MOST_RECOVERY = 60.0
SCENARIOS = ("throughput", "steady", "overload", "idle", "loris", "aborted")
BATCH, QUEUE, DEADLINE = 8, 64, 10.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class ServedModel:
    """A running service."""

    address: Address
    process: int
    classes: int

    def request(self, number: int) -> bytes:
        return generation(class_id=number % self.classes, seed=number)

    @property
    def resident_bytes(self) -> int:
        """Memory of the service without its workers."""
        return _resident_bytes(self.process)

    @property
    def worker_bytes(self) -> int:
        """Memory of all workers."""
        listed = Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
        return sum(_resident_bytes(int(child)) for child in listed)

    @property
    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process}/fd"))

    @property
    def processor_seconds(self) -> float:
        """Processor time of the service without its workers."""
        values = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(values[11]) + int(values[12])) / _TICKS


def _resident_bytes(process: int) -> int:
    rows = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(row.split()[1]) * 1024 for row in rows if row.startswith("VmRSS:")), 0)


@contextmanager
def served(bundle: Path, options: Sequence[str] = ()) -> Iterator[ServedModel]:
    """Run `flexvar serve` on a free port. Raises FlexVARError if the bundle or the service cannot be opened."""
    with FlexVARPipeline.from_bundle(bundle) as pipeline:
        classes = pipeline.model.classes
    script = "from flexvar_runtime.cli.main import main; main()"
    program = [sys.executable, "-c", script, "serve", str(bundle), "--port", "0", "--json", *options]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        parts = urlsplit(_address(process.stdout.readline()))
        if parts.hostname is None or parts.port is None:
            got = f"flexvar serve ended with exit code {process.wait()}."
            raise EnvironmentFailed(got, expected="a service", fix=f"Run it alone to see why: flexvar serve {bundle}")
        yield ServedModel(Address(parts.hostname, parts.port), process.pid, classes)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(line: str) -> str:
    """The address in the line that a ready service prints; "" for any other line."""
    try:
        values = json.loads(line)
    except ValueError:
        return ""
    return str(values.get("url", "")) if isinstance(values, dict) else ""


def measure(
    bundle: Path, scenarios: Sequence[str], clients: int, seconds: float, turns: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The figures of every scenario, all of one service with the default number of workers. Raises FlexVARError."""
    found: dict[str, dict[str, Any]] = {}
    with served(bundle, ["--queue", str(QUEUE), "--receive-timeout", str(DEADLINE)]) as service:
        for name in scenarios:
            say(f"{name} ...")
            if name == "throughput":
                found[name] = beside_the_pipeline(service, bundle, clients, seconds, turns, say)
            elif name == "steady":
                found[name] = steady(service, clients, seconds, QUEUE)
            elif name == "overload":
                rate = images_per_second(asyncio.run(closed_loop(service.address, 16, 5.0, service.request)))
                found[name] = overload(service, rate, 3.0, seconds)
            elif name == "idle":
                found[name] = beside_idle(service, 1000, 50, clients, seconds, turns)
            elif name == "loris":
                found[name] = slow_loris(service, 200, DEADLINE)
            else:
                found[name] = aborted(service, clients, seconds)
    return found


def beside_the_pipeline(
    service: ServedModel, bundle: Path, clients: int, seconds: float, turns: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Images a second of the service and of a bare pipeline with all threads and batches of 8, in turns.

    The pipeline writes no files. The service writes PNG files and sends them.
    """
    bare, over_http = list[float](), list[float]()
    statuses: Counter[int] = Counter()
    with FlexVARPipeline.from_bundle(bundle) as pipeline:
        labels = [i % pipeline.model.classes for i in range(BATCH)]
        pipeline(labels, seed=0)
        for turn in range(turns):
            started, images = time.monotonic(), 0
            while time.monotonic() < started + seconds:
                pipeline(labels, seed=images)
                images += BATCH
            bare.append(images / (time.monotonic() - started))
            done = asyncio.run(closed_loop(service.address, clients, seconds, service.request))
            statuses += Counter(request.status for request in done)
            over_http.append(images_per_second(done))
            say(f"turn {turn + 1} of {turns}: pipeline {bare[-1]:.1f}, service {over_http[-1]:.1f} images/s")
    return {
        "clients": clients,
        "pipeline_images_per_second": statistics.median(bare),
        "service_images_per_second": statistics.median(over_http),
        "ratio": statistics.median(one / other for one, other in zip(over_http, bare, strict=True)),
        "statuses": _by_name(statuses),
    }


def steady(service: ServedModel, clients: int, seconds: float, queue: int) -> dict[str, Any]:
    """A closed loop of more clients than workers, with the 99th percentile beside its bound.

    Growth is that after the first tenth of the time.
    """
    asyncio.run(closed_loop(service.address, clients, seconds / 10, service.request))
    before, workers = service.resident_bytes, service.worker_bytes
    done = asyncio.run(closed_loop(service.address, clients, seconds, service.request))
    rate, times = images_per_second(done), _times(done)
    return {
        "clients": clients,
        "seconds": seconds,
        "statuses": _by_name(Counter(request.status for request in done)),
        "images_per_second": rate,
        "p50_ms": times["median"] * 1e3,
        "p99_ms": _p99(done) * 1e3,
        "p99_bound_ms": (queue + 2 * BATCH) / rate * 1e3 if rate else math.nan,
        "growth_mb": (service.resident_bytes - before) / 1e6,
        "workers_mb": workers / 1e6,
        "workers_growth_mb": (service.worker_bytes - workers) / 1e6,
    }


def overload(service: ServedModel, rate: float, times: float, seconds: float) -> dict[str, Any]:
    """Requests at several times the rate of the service, then the time until a single request is quick again.

    recovery_seconds: None if it was not quick within a minute.
    """

    async def run() -> tuple[list[Request], float | None, float]:
        client = Client(service.address)
        alone = statistics.median([(await client.send(service.request(i))).seconds for i in range(10)])
        done = await open_loop(service.address, times * rate, seconds, service.request)
        ended = max(request.started for request in done)
        recovery = None
        while recovery is None and time.monotonic() < ended + MOST_RECOVERY:
            again = await client.send(service.request(0))
            if again.status == 200 and again.seconds <= 2 * alone:
                recovery = time.monotonic() - ended
        client.close()
        return done, recovery, alone

    before = service.resident_bytes
    done, recovery, alone = asyncio.run(run())
    return {
        "times": times,
        "seconds": seconds,
        "statuses": _by_name(Counter(request.status for request in done)),
        "accepted_p99_ms": _p99(done) * 1e3,
        "alone_ms": alone * 1e3,
        "recovery_seconds": recovery,
        "growth_mb": (service.resident_bytes - before) / 1e6,
    }


def beside_idle(service: ServedModel, idle: int, slow: int, clients: int, seconds: float, turns: int) -> dict[str, Any]:
    """The 99th percentile of healthy clients, without and with idle and slow connections, in turns."""
    quiet, crowded = list[Request](), list[Request]()
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: slow\r\nx-slow: "

    async def with_others() -> list[Request]:
        held = asyncio.gather(
            hold(service.address, idle, b"", b"", 1.0, seconds + 1),
            hold(service.address, slow, head, b"x", 1.0, seconds + 1),
        )
        await asyncio.sleep(1)
        found = await closed_loop(service.address, clients, seconds, service.request)
        await held
        return found

    for _ in range(turns):
        quiet += asyncio.run(closed_loop(service.address, clients, seconds, service.request))
        crowded += asyncio.run(with_others())
    return {
        "idle": idle,
        "slow": slow,
        "clients": clients,
        "p99_without_ms": _p99(quiet) * 1e3,
        "p99_with_ms": _p99(crowded) * 1e3,
        "ratio": _p99(crowded) / _p99(quiet),
        "statuses": _by_name(Counter(request.status for request in (*quiet, *crowded))),
    }


def aborted(service: ServedModel, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that close the connection at a random moment, half of them of streams. Then one request more.

    growth and files: of the service, from after the first tenth of the time to the end.
    """
    rng = random.Random(0)
    stream: dict[str, Any] = {"accept": "text/event-stream", "stream": True, "partial_images": 3}

    async def one(end: float, counts: Counter[str]) -> None:
        client = Client(service.address)
        while time.monotonic() < end:
            number = rng.randrange(2**32)
            more: dict[str, Any] = stream if number % 2 else {}
            request = generation(class_id=number % service.classes, seed=number, **more)
            sending = asyncio.create_task(client.send(request))
            done, _ = await asyncio.wait({sending}, timeout=rng.expovariate(5.0))
            counts[f"status_{sending.result().status}" if done else "aborted"] += 1
            if done and sending.result().status != 200:
                await asyncio.sleep(0.1)
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
            client.close()

    async def run(duration: float) -> Counter[str]:
        counts: Counter[str] = Counter()
        end = time.monotonic() + duration
        await asyncio.gather(*(one(end, counts) for _ in range(clients)))
        return counts

    asyncio.run(run(seconds / 10))
    time.sleep(1)
    memory, workers, files = service.resident_bytes, service.worker_bytes, service.open_files
    counts = asyncio.run(run(seconds * 9 / 10))
    time.sleep(1)
    last = asyncio.run(closed_loop(service.address, 1, 1.0, service.request))
    return {
        "clients": clients,
        "seconds": seconds,
        **counts,
        "growth_mb": (service.resident_bytes - memory) / 1e6,
        "workers_mb": workers / 1e6,
        "workers_growth_mb": (service.worker_bytes - workers) / 1e6,
        "files_before": files,
        "files_after": service.open_files,
        "statuses_afterwards": _by_name(Counter(request.status for request in last)),
    }


def slow_loris(service: ServedModel, connections: int, deadline: float) -> dict[str, Any]:
    """Connections that send one byte of a head after another, past the deadline of the service for a request."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: slow\r\nx-slow: "
    healthy, closed = asyncio.run(
        meanwhile(
            hold(service.address, connections, head, b"x", 0.5, deadline + 3),
            closed_loop(service.address, 4, deadline + 3, service.request),
        )
    )
    return {
        "connections": connections,
        "deadline_seconds": deadline,
        "left_open": connections - closed,
        "statuses": _by_name(Counter(request.status for request in healthy)),
    }


def images_per_second(done: Sequence[Request]) -> float:
    """Images of answered requests, from the first request to the last answer."""
    good = [request for request in done if request.status == 200]
    if not good:
        return 0.0
    return len(good) / (max(one.started + one.seconds for one in good) - min(one.started for one in good))


def _times(done: Sequence[Request]) -> dict[str, float]:
    return quantiles([request.seconds for request in done if request.status == 200] or [math.nan])


def _p99(done: Sequence[Request]) -> float:
    times = sorted(request.seconds for request in done if request.status == 200) or [math.nan]
    return times[max(0, -(-99 * len(times) // 100) - 1)]


def _by_name(statuses: Counter[int]) -> dict[str, int]:
    return {str(status): count for status, count in sorted(statuses.items())}
