"""A fork while a pipeline is open on a GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from fake_machine import Machine

from flexvar_runtime import InvalidInput

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


def in_a_child(action: Callable[[], None]) -> int:
    """The exit status of a forked process: 0 if the action raised nothing."""
    child = os.fork()
    if not child:
        try:
            action()
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_a_child_leaves_the_device_alone(machine: Machine) -> None:
    """What is on a GPU belongs to the parent's context. The child neither uses nor frees it."""
    with machine.open() as pipeline, machine.device.recorded() as events:
        scales = pipeline.iter_scales([1], "1_2_3", seed=0)
        next(scales)
        del events[:]

        def child() -> None:
            nonlocal scales
            with pytest.raises(InvalidInput, match=r"fork.*spawn"):
                pipeline([1], "1_2_3")
            del scales
            gc.collect()
            pipeline.close()
            assert not events

        assert in_a_child(child) == 0
        assert [step.index for step in scales] == [1, 2]
