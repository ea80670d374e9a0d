"""Whether the system still lets this process start threads."""

from __future__ import annotations

import _thread
import os
import threading
import time

from ..errors import EnvironmentFailed

SPARE = 2
"""Threads to try beyond those that are needed. The libraries start some of their own, and so may other processes."""
_OWN_THREADS = "/proc/self/task"


def require_threads(count: int) -> None:
    """Raise EnvironmentFailed unless `count` threads can be started now beside those that run.

    Libraries hang or end the process if they cannot start a thread. So as many threads as they will start are started
    here first, with stacks of the same size. Each takes some 0.05 ms. They wait for a lock without running any Python
    code, and have ended when this returns.
    """
    if count <= 0:
        return
    before, locks = _running(), []
    stack_size = threading.stack_size(0)  # that of the system, which libraries use
    try:
        for _ in range(count + SPARE):
            lock = _thread.allocate_lock()
            lock.acquire()
            _thread.start_new_thread(lock.acquire, ())
            locks.append(lock)
    except (RuntimeError, MemoryError) as error:
        raise cannot_start(count) from error
    finally:
        threading.stack_size(stack_size)
        for lock in locks:
            lock.release()
        _wait_until(before)


def cannot_start(count: int) -> EnvironmentFailed:
    """The error that `count` threads cannot be started."""
    return EnvironmentFailed(
        f"The system does not let this process start {count} more thread{'s' * (count > 1)}.",
        expected="a system that starts the threads",
        fix="Use a smaller number of threads, or raise the limit of processes (ulimit -u, pids.max) or of "
        "address space (ulimit -v).",
    )


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
        time.sleep(0.0001)
