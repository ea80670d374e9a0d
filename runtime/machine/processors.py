"""How many processors this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .control_groups import PROC, ControlGroup, control_groups


def default_threads(environ: Mapping[str, str] = os.environ, proc: Path = PROC) -> int:
    """The number of threads to compute with, unless the user names one. At least 1.

    The smallest of: the processors in the affinity mask, the quota of the control groups rounded up, and
    OMP_NUM_THREADS if it is set.
    """
    return max(1, min([_processors(), *_quotas(proc), *_wanted(environ)]))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(proc: Path) -> Iterator[int]:
    """The processors that each control group allows, rounded up: two threads use 1.5 processors, one does not."""
    for group in control_groups("cpu", proc):
        with suppress(OSError, ValueError, ZeroDivisionError):  # a group without a quota
            quota, period = _quota(group)
            if quota > 0:  # version 1 writes -1 for no quota
                yield math.ceil(quota / period)


def _quota(group: ControlGroup) -> tuple[int, int]:
    """The time in microseconds that a group may run in each period. Raises ValueError if version 2 says "max"."""
    if group.version == 1:
        return int(group.read("cpu.cfs_quota_us")), int(group.read("cpu.cfs_period_us"))
    quota, period = group.read("cpu.max").split()
    return int(quota), int(period)


def _wanted(environ: Mapping[str, str]) -> Iterator[int]:
    """OMP_NUM_THREADS, of which a list such as "4,2" names the number of the outermost level first."""
    with suppress(ValueError):
        wanted = int(environ.get("OMP_NUM_THREADS", "").partition(",")[0])
        if wanted > 0:
            yield wanted
