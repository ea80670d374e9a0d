"""How times are taken: warm-up, repetition within a budget, quantiles; and the height of the device's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Budget:
    """How often something is repeated: `most` times at the most, and no new time after `seconds`, but `least` times."""

    warmup: int = 3
    least: int = 5
    most: int = 200
    seconds: float = 3.0


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile and minimum, in the unit of the samples."""
    low, middle, high = np.quantile(np.asarray(samples, np.float64), (0.1, 0.5, 0.9)).tolist()
    return {"median": middle, "p10": low, "p90": high, "min": float(min(samples))}


def repeat(run: Callable[[], float | None], budget: Budget) -> tuple[list[float], list[float]]:
    """Call `run` again and again: wall seconds of every counted call, and what it returned where that is a number.

    `run` returns when its work is done, with its seconds on the device or None.
    """
    for _ in range(budget.warmup):
        run()
    walls: list[float] = []
    devices: list[float] = []
    end = time.perf_counter() + budget.seconds
    while len(walls) < budget.least or (len(walls) < budget.most and time.perf_counter() < end):
        start = time.perf_counter()
        seconds = run()
        walls.append(time.perf_counter() - start)
        if seconds is not None:
            devices.append(seconds)
    return walls, devices


def timed_row(batch: int, walls: Sequence[float], devices: Sequence[float], budget: Budget) -> dict[str, Any]:
    """What every row of times says."""
    wall = quantiles(walls)
    return {
        "batch": batch,
        "warmup": budget.warmup,
        "samples": len(walls),
        "decoder_included": True,
        "wall_s": wall,
        "device_s": quantiles(devices) if devices else None,
        "images_per_second": batch / wall["median"],
    }


@contextmanager
def memory_watch(used_bytes: Callable[[], int] | None) -> Iterator[dict[str, int]]:
    """Bytes in use on the device, asked again and again while the body runs: "before", "peak" and "after".

    Empty without a device. The asking disturbs times: nothing is timed in such a body.
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
    """Of this process; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return None
