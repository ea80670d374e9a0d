"""Whether the system still lets this process start threads."""

from __future__ import annotations

import _thread
import os
import queue
import threading
import time
from contextlib import suppress
from typing import TypeAlias

from ..errors import EnvironmentFailed
from .processors import default_threads

SPARE = 1
"""Threads to try beyond those that are needed, because other processes may count towards the same limit."""
ALLOCATED = 4096
"""Bytes that each thread allocates. With its first allocation a thread reserves address space beside its stack."""
SECONDS = 10.0
"""How long to wait for the threads. They need milliseconds, also on a busy machine."""
FEWER_THREADS = (
    "Use a smaller number of threads, or raise the limit of processes (ulimit -u, pids.max) or of address space "
    "(ulimit -v)."
)
_OWN_THREADS = "/proc/self/task"

_Started: TypeAlias = queue.SimpleQueue[bytearray]


def require_threads(count: int) -> None:
    """Raise EnvironmentFailed unless `count` threads can be started now beside those that run.

    Libraries hang or end the process if they cannot start a thread. So this function first starts the same number of
    threads, with stacks of the same size. Each takes about 0.1 ms. All have ended when it returns.
    """
    if count <= 0:
        return
    before, started, end = _running(), _Started(), _thread.allocate_lock()
    stack_size = threading.stack_size(0)  # that of the system, which the libraries use
    end.acquire()
    try:
        for _ in range(count + SPARE):
            _thread.start_new_thread(_hold, (started, end))
            started.get(timeout=SECONDS)  # it has allocated before the next one starts, as in a library
    except (RuntimeError, MemoryError, queue.Empty) as error:
        raise cannot_start(count) from error
    finally:
        threading.stack_size(stack_size)
        end.release()
        _wait_until(before)


def limit_openblas() -> None:
    """Let NumPy's OpenBLAS start no more threads than it can. Call this before NumPy is imported.

    Otherwise it starts one for each processor, and raises SIGINT if it cannot. A number that the user has set stays.
    """
    threads = default_threads()
    try:
        require_threads(threads - 1)
    except EnvironmentFailed:
        threads = 1
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))


def cannot_start(count: int) -> EnvironmentFailed:
    """The error that `count` threads cannot be started."""
    got = f"The system does not let this process start {count} more thread{'s' * (count > 1)}."
    return EnvironmentFailed(got, expected="a system that starts the threads", fix=FEWER_THREADS)


def _hold(started: _Started, end: _thread.LockType) -> None:
    """Allocate some memory, say so, and wait until all threads may end."""
    with suppress(MemoryError):
        started.put(bytearray(ALLOCATED))
        with end:
            pass


def _running() -> int:
    """The number of threads of this process; 0 where the system does not say."""
    try:
        return os.stat(_OWN_THREADS).st_nlink
    except OSError:
        return 0


def _wait_until(running: int) -> None:
    """Wait until no more threads run than `running`, for at most a second.

    A thread still counts for a moment after Python has ended it.
    """
    end = time.monotonic() + 1
    while _running() > running and time.monotonic() < end:
        time.sleep(0)  # lets other threads run; the shortest real sleep would take ten times as long
