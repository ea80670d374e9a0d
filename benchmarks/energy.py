"""Energy that the machine's GPU has taken, as its driver counts it (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_SECONDS = 1.0  # the counter moves in steps of up to a tenth of a second

Counter = Callable[[], float]


def gpu_counter() -> Counter | None:
    """What reads the joules taken since the driver was loaded; None without a GPU, with several of which the work could
    be on any, and where there is no such counter."""
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        if nvml.device_get_count_v2() != 1:
            return None
        gpu = nvml.device_get_handle_by_index_v2(0)
        nvml.device_get_total_energy_consumption(gpu)
    except Exception:  # no library, no driver, a card that does not count: each says so in its own way
        return None
    return lambda: float(nvml.device_get_total_energy_consumption(gpu)) / 1e3


def joules_of_call(call: Callable[[], object], counter: Counter) -> float:
    """The mean of calls one after the other, for so long that the counter's steps do not matter."""
    calls, start, before = 0, time.perf_counter(), counter()
    while time.perf_counter() - start < LEAST_SECONDS:
        call()
        calls += 1
    return (counter() - before) / calls
