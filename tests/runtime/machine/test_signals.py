"""Processes that are started while signals are blocked do not notice Ctrl-C: their parent ends them."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import pytest

from flexvar_runtime.machine.signals import blocked_in_children


def interrupt_itself(connection: Connection) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    connection.send("alive")


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
def test_children_outlive_ctrl_c_and_the_parent_notices_it() -> None:
    context: Any = mp.get_context("fork" if "fork" in mp.get_all_start_methods() else "spawn")
    near, far = context.Pipe()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with blocked_in_children({signal.SIGINT}):
            process = context.Process(target=interrupt_itself, args=(far,))
            process.start()
        assert near.recv() == "alive"
        process.join()
        assert process.exitcode == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
def test_the_signal_stays_blocked_while_a_process_starts() -> None:
    """The first start of the resource tracker would unblock it."""
    with blocked_in_children({signal.SIGINT}):
        resource_tracker.ensure_running()
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
