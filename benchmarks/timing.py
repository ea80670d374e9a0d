"""Measures times (warm-up, repetition within a budget, quantiles) and the peak of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .energy import LEAST_SECONDS, Counter

MEMORY_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Budget:
    """How often a call is repeated: until `seconds` have passed, but at least `least` and at most `most` times."""

    warmup: int = 3
    least: int = 5
    most: int = 200
    seconds: float = 3.0


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile and minimum, in the unit of the samples."""
    low, middle, high = np.quantile(np.asarray(samples, np.float64), (0.1, 0.5, 0.9)).tolist()
    return {"median": middle, "p10": low, "p90": high, "min": float(min(samples))}


@dataclass(frozen=True)
class Times:
    """The times of counted calls.

    walls: wall seconds of each call. devices: seconds on the device of each call, if it reports them. joules: of all
    calls together, None if they are not counted or if the calls were too short for the counter.
    """

    walls: list[float]
    devices: list[float]
    joules: float | None = None


def repeat(run: Callable[[], float | None], budget: Budget, counter: Counter | None = None) -> Times:
    """Time calls of `run`, which returns when its work is done: the seconds on the device, or None."""
    for _ in range(budget.warmup):
        run()
    walls: list[float] = []
    devices: list[float] = []
    before = counter() if counter is not None else None
    end = time.perf_counter() + budget.seconds
    while len(walls) < budget.least or (len(walls) < budget.most and time.perf_counter() < end):
        start = time.perf_counter()
        seconds = run()
        walls.append(time.perf_counter() - start)
        if seconds is not None:
            devices.append(seconds)
    if counter is None or before is None or sum(walls) < LEAST_SECONDS:
        return Times(walls, devices)
    return Times(walls, devices, counter() - before)


def timed_row(batch: int, times: Times, budget: Budget) -> dict[str, Any]:
    """The values that every row of times has."""
    wall = quantiles(times.walls)
    return {
        "batch": batch,
        "warmup": budget.warmup,
        "samples": len(times.walls),
        "decoder_included": True,
        "wall_s": wall,
        "device_s": quantiles(times.devices) if times.devices else None,
        "images_per_second": batch / wall["median"],
        "joules_per_image": None if times.joules is None else times.joules / (batch * len(times.walls)),
    }


@contextmanager
def memory_watch(used_bytes: Callable[[], int] | None) -> Iterator[dict[str, int]]:
    """Poll the bytes in use on the device while the body runs. Yields a dictionary of "before", "peak" and "after".

    The dictionary stays empty without a device. Polling disturbs times, so nothing may be timed in the body.
    """
    found: dict[str, int] = {}
    if used_bytes is None:
        yield found
        return
    stop = threading.Event()
    found["before"] = found["peak"] = used_bytes()

    def watch() -> None:
        while not stop.wait(MEMORY_POLL_SECONDS):
            found["peak"] = max(found["peak"], used_bytes())

    watcher = threading.Thread(target=watch, name="memory watch", daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found["after"] = used_bytes()
        found["peak"] = max(found["peak"], found["after"])


def resident_bytes() -> int | None:
    """Resident memory of this process. None if the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return None
