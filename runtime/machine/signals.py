"""Signals that a child process must not get."""

from __future__ import annotations

import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def blocked_in_children(numbers: Collection[signal.Signals]) -> Iterator[None]:
    """Processes that are started in the body begin with these signals blocked.

    A terminal sends Ctrl-C to all processes, but only their parent must answer it: it ends them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its first start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
