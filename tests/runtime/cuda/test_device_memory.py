"""Memory of a device that keeps dropped buffers reserved: it stays bounded, and is given back before anything fails."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_machine import SCHEDULE, Machine
from fakes import FakeDevice

from flexvar_runtime import FlexVARPipeline, OutOfMemory, ScaleSchedule
from flexvar_runtime.cuda.device import allocate
from flexvar_runtime.generation.device import SHAPES_KEPT
from flexvar_runtime.request import Shape

BATCHES = range(1, SHAPES_KEPT + 5)


def bytes_of(pipeline: FlexVARPipeline, images: int) -> int:
    generator: Any = pipeline.generator
    return int(generator.bytes_of(Shape(ScaleSchedule.parse(SCHEDULE), images, True)))


def drop_all(pipeline: FlexVARPipeline) -> None:
    generator: Any = pipeline.generator
    generator._drop(0)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alternate(machine: Machine) -> tuple[int, int]:
    """Most bytes reserved while shapes come and go, and a bound: those kept, one more, and what all of them share."""
    with machine.open() as pipeline:
        pipeline([0] * BATCHES[-1], SCHEDULE, seed=1)
        drop_all(pipeline)
        machine.device.blocks = [block for block in machine.device.blocks if block.used]
        shared = machine.device.used
        most = 0
        for _ in range(2):
            for images in BATCHES:
                pipeline([0] * images, SCHEDULE, seed=1)
                most = max(most, machine.device.reserved)
        return most, shared + sum(bytes_of(pipeline, images) for images in BATCHES[-SHAPES_KEPT - 1 :])


def test_alternating_shapes_stay_bounded(machine: Machine) -> None:
    with no_garbage_collection():
        most, bound = alternate(machine)
    assert most <= bound


def test_they_would_not_without_trimming(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the bound."""
    monkeypatch.setattr(FakeDevice, "trim", FakeDevice.synchronize)
    most, bound = alternate(machine)
    assert most > bound


def test_a_shape_that_is_dropped_is_really_freed(machine: Machine) -> None:
    with machine.open() as pipeline, no_garbage_collection():
        pipeline([0], SCHEDULE, seed=1)
        generator: Any = pipeline.generator
        generation = weakref.ref(next(iter(generator._spare.values())))
        memories = [weakref.ref(arena.whole.memory) for arena in (generation()._request, generation()._work)]
        before = machine.device.reserved
        generator._drop(0)
        assert generation() is None and [memory() for memory in memories] == [None, None]
        assert machine.device.reserved == machine.device.used <= before - bytes_of(pipeline, 1)


def test_a_pipeline_that_is_closed_leaves_nothing_reserved(machine: Machine) -> None:
    pipeline = machine.open()
    for images in (1, 2):
        pipeline([0] * images, SCHEDULE, seed=1)
    with no_garbage_collection():
        generator: Any = pipeline.generator
        generator._release()
        assert machine.device.reserved == machine.device.used < bytes_of(pipeline, 1)


def reserve(device: FakeDevice, nbytes: int) -> None:
    """Leave a dropped buffer of this size, which no other buffer can use."""
    device.allocate(nbytes)
    assert device.reserved - device.used >= nbytes


def test_a_request_that_does_not_fit_beside_reserved_memory_is_tried_again(machine: Machine) -> None:
    device = machine.device
    with machine.open() as pipeline:
        expected = pipeline([1, 2], SCHEDULE, seed=3)
        drop_all(pipeline)
        device.size = device.used + bytes_of(pipeline, 2)
        reserve(device, bytes_of(pipeline, 2) - 7)
        with device.recorded() as events:
            got = pipeline([1, 2], SCHEDULE, seed=3)
        assert events.index("trim") > events.index("allocate")  # refused first
        np.testing.assert_array_equal(got.images, expected.images)


def test_shapes_that_nobody_uses_make_room_for_working_memory(machine: Machine) -> None:
    """It is found too small in the middle of a generation, whose buffers have fitted beside the spare shape."""
    device = machine.device
    with machine.open() as pipeline:
        expected = pipeline([1, 2], SCHEDULE, seed=3)
    machine.device.closed = False
    with machine.open() as pipeline:
        pipeline([1], SCHEDULE, seed=1)
        device.size = device.used + bytes_of(pipeline, 2) + 1
        pipeline.generator.backend.scratch.reserve(10_000)  # type: ignore[attr-defined]
        with device.recorded() as events:
            got = pipeline([1, 2], SCHEDULE, seed=3)
        assert "trim" in events and got.timings.mode == "cuda-graph"
        np.testing.assert_array_equal(got.images, expected.images)
        generator: Any = pipeline.generator
        assert [shape.images for shape in generator._spare] == [2]


def test_a_request_that_never_fits_leaves_the_pipeline_usable(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it shows only while its buffers are allocated; the error keeps none of them alive."""
    device = machine.device
    with machine.open() as pipeline:
        expected = pipeline([1], SCHEDULE, seed=3)
        drop_all(pipeline)
        device.trim()
        idle = device.used
        device.size = idle + bytes_of(pipeline, 2)
        with pytest.raises(OutOfMemory, match="at most 2") as refusal:
            pipeline([1] * 3, SCHEDULE, seed=3)
        assert refusal.value.exit_code == 6
        with monkeypatch.context() as lying, no_garbage_collection():
            lying.setattr(device, "free_bytes", lambda: 2**40)
            with pytest.raises(OutOfMemory) as failure, device.recorded() as events:
                pipeline([1] * 3, SCHEDULE, seed=3)
            assert failure.value.exit_code == 6 and events.count("trim") >= 1
            assert device.used == idle  # `failure` is still held
        got = pipeline([1], SCHEDULE, seed=3)
        np.testing.assert_array_equal(got.images, expected.images)


def test_a_single_buffer_is_tried_again_too(machine: Machine) -> None:
    device = machine.device
    device.activate()
    device.size = 1000
    reserve(device, 600)
    kept = allocate(device, 700)
    assert device.reserved == device.used == 700 and kept.address
    with pytest.raises(OutOfMemory):
        allocate(device, 301)
    assert allocate(device, 300).address
