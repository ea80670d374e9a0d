"""Reads the energy that the GPU has used, as its driver counts it (NVML)."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST_SECONDS = 1.0  # of counted work, because the counter is updated only every tenth of a second

Counter = Callable[[], float]


def gpu_counter() -> Counter | None:
    """A function that returns the joules used since the driver was loaded.

    None without a GPU, with several GPUs, and where the GPU has no such counter.
    """
    try:
        from cuda.bindings import nvml

        nvml.init_v2()
        if nvml.device_get_count_v2() != 1:
            return None
        gpu = nvml.device_get_handle_by_index_v2(0)
        nvml.device_get_total_energy_consumption(gpu)
    except Exception:  # no library, no driver and no counter raise different errors
        return None
    return lambda: float(nvml.device_get_total_energy_consumption(gpu)) / 1e3


def joules_of_call(call: Callable[[], object], counter: Counter) -> float:
    """The mean energy of one call in joules. Calls are repeated until the counter is precise enough."""
    calls, start, before = 0, time.perf_counter(), counter()
    while time.perf_counter() - start < LEAST_SECONDS:
        call()
        calls += 1
    return (counter() - before) / calls
