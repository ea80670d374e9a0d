"""A whole generation on a device that computes on the host: the tokens of ort-cpu, captured once, never waiting."""

from __future__ import annotations

import ctypes
import gc
import itertools
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_machine import OTHER, SCHEDULE, Machine

from flexvar_runtime import (
    ArtifactRefused,
    FlexVARPipeline,
    Guidance,
    InvalidInput,
    OutOfMemory,
    Sampling,
    ScaleSchedule,
)
from flexvar_runtime.backends.tensorrt.backend import TrtGraph
from flexvar_runtime.errors import DeviceFailed
from flexvar_runtime.generation.captured import WARM_UPS
from flexvar_runtime.generation.conditions import ConditionCache
from flexvar_runtime.generation.device import SHAPES_KEPT
from flexvar_runtime.generation.device_memory import device_plan
from flexvar_runtime.request import Request, Shape


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> FlexVARPipeline:
    return FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1)


CASES: list[tuple[list[int], str, dict[str, Any]]] = [
    ([3, 1], SCHEDULE, {}),
    ([2], SCHEDULE, {"guidance": Guidance(0)}),
    ([1, 1, 4], OTHER, {"guidance": Guidance(3.0, "constant"), "sampling": Sampling(top_k=5, top_p=0.5)}),
    ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], SCHEDULE, {"sampling": Sampling(top_k=0, top_p=0.9, greedy_scales="3")}),
    ([4], "1", {}),
]


@pytest.mark.parametrize(("labels", "schedule", "options"), CASES)
def test_the_same_images_as_on_the_cpu(
    machine: Machine, reference: FlexVARPipeline, labels: list[int], schedule: str, options: dict[str, Any]
) -> None:
    expected = reference(labels, schedule, seed=2**64 - 1, first_index=2**40, keep_decoded=True, **options)
    with machine.open() as pipeline:
        for again in (False, True):  # captured, replayed
            got = pipeline(labels, schedule, seed=2**64 - 1, first_index=2**40, keep_decoded=True, **options)
            assert got.timings.mode == "cuda-graph" and got.timings.device == 0.25, again
            for scale, other in zip(got.tokens, expected.tokens, strict=True):
                np.testing.assert_array_equal(scale, other)
            np.testing.assert_array_equal(got.images, expected.images)
            assert got.decoded is not None and expected.decoded is not None
            np.testing.assert_allclose(got.decoded, expected.decoded, atol=1e-5)
        stepped = list(pipeline.iter_scales(labels, schedule, seed=2**64 - 1, first_index=2**40, **options))
        for step, other in zip(stepped, expected.tokens, strict=True):
            np.testing.assert_array_equal(step.tokens, other)
        np.testing.assert_array_equal(stepped[-1].preview(), expected.images)


def test_a_captured_generation_is_replayed_with_other_labels_seeds_and_guidance(
    machine: Machine, reference: FlexVARPipeline
) -> None:
    with machine.open() as pipeline:
        pipeline([0, 1], SCHEDULE, seed=1)
        pipeline([2, 3], SCHEDULE, Guidance(1.5), seed=2)
        with machine.device.recorded() as events:
            got = pipeline([4, 0], SCHEDULE, Guidance(4.0, "constant"), seed=3, first_index=7)
        assert events.count("replay") == 1 and "capture" not in events
        expected = reference([4, 0], SCHEDULE, Guidance(4.0, "constant"), seed=3, first_index=7)
        for scale, other in zip(got.tokens, expected.tokens, strict=True):
            np.testing.assert_array_equal(scale, other)
        np.testing.assert_array_equal(got.images, expected.images)


def test_nothing_waits_inside_a_generation(machine: Machine) -> None:
    """Known classes, a captured shape: one write, one gather, one replay, one wait."""
    with machine.open() as pipeline:
        pipeline([0, 1], SCHEDULE, seed=1)
        with machine.device.recorded() as events:
            pipeline([1, 0], SCHEDULE, seed=2)
    assert events == ["write", "gather_rows", "zero", "replay", "synchronize"]


def test_what_is_captured(machine: Machine) -> None:
    with machine.open() as pipeline:
        with machine.device.recorded() as events:
            pipeline([0, 1], SCHEDULE, seed=1)
        captured = events[events.index("capture") + 1 : events.index("captured")]
        assert captured == [
            "zero",
            *["execute step", "sample_rows"],
            *["next_inputs", "execute step", "sample_rows"] * 3,
            *["copy", "execute decode", "to_uint8"],
            "read",
        ]
        warm = events[: events.index("capture")]
        assert warm.count("execute step") == WARM_UPS * 4  # before capture, never inside it
        assert events.count("replay") == 1


def test_one_capture_serves_all_sampling_options(machine: Machine, reference: FlexVARPipeline) -> None:
    options = [Sampling(top_k, top_p, "none") for top_k, top_p in ((1, 0.0), (7, 0.9), (0, 0.5), (900, 1.0), (2, 0.3))]
    with machine.open() as pipeline, machine.device.recorded() as events:
        for sampling in [*options, Sampling(3, 0.7, "2,4")]:
            got, expected = (p([0, 3], SCHEDULE, sampling=sampling, seed=1) for p in (pipeline, reference))
            for scale, other in zip(got.tokens, expected.tokens, strict=True):
                np.testing.assert_array_equal(scale, other)
    assert events.count("capture") == 1


def test_one_capture_serves_images_with_their_own_seed_index_class_and_weight(
    machine: Machine, reference: FlexVARPipeline
) -> None:
    batches = [
        ([0, 3, 1], {"seed": [5, 2**64 - 1, 5], "first_index": [0, 2**40, 7], "guidance": [2.5, 0.0, 4.0]}),
        ([2, 2, 4], {"seed": [1, 2, 3], "guidance": [1.0, 9.0, 0.5]}),
        ([4, 0, 1], {"seed": 6, "guidance": 3.0}),
    ]
    with machine.open() as pipeline, machine.device.recorded() as events:
        for labels, options in batches:
            got, expected = (p(labels, SCHEDULE, **options) for p in (pipeline, reference))
            assert got.timings.mode == "cuda-graph" and got.settings[0].label == labels[0]
            for scale, other in zip(got.tokens, expected.tokens, strict=True):
                np.testing.assert_array_equal(scale, other)
    assert events.count("capture") == 1


def test_warm_shapes_are_pinned(machine: Machine) -> None:
    """No other shape evicts them, however few are kept."""
    with machine.open(shapes_kept=1) as pipeline:
        pipeline.warmup(SCHEDULE, batch_sizes=(1, 2))
        with machine.device.recorded() as events:
            for batch in (3, 4, 5, 3):
                pipeline([0] * batch, SCHEDULE, seed=1)
            assert events.count("capture") == 4  # of these only the last is kept
            for batch in (1, 2):
                pipeline([0] * batch, SCHEDULE, seed=1)
        assert events.count("capture") == 4


def test_two_loops_over_a_warm_shape_keep_its_capture(machine: Machine) -> None:
    with machine.open() as pipeline:
        pipeline.warmup(SCHEDULE, batch_sizes=(2,))
        with machine.device.recorded() as events:
            for seed in range(2):
                scales = pipeline.iter_scales([0, 1], SCHEDULE, seed=seed)
                next(scales)
                list(pipeline.iter_scales([1, 0], SCHEDULE, seed=seed))  # in buffers of its own
                scales.close()  # type: ignore[attr-defined]
            pipeline([0, 1], SCHEDULE, seed=3)
        assert "capture" not in events and events.count("replay") == 1
        generator: Any = pipeline.generator
        assert len(generator._spare) == 1


@pytest.mark.parametrize("room", [0, 1])
def test_a_failed_allocation_of_conditions_can_be_tried_again(
    machine: Machine, reference: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """There is memory for the first of their buffers only, or for none."""
    real, slots = type(machine.device).allocate, ConditionCache.slots
    failures: list[int] = []

    def slots_without_memory(self: ConditionCache, labels: Sequence[int]) -> list[int]:
        calls = itertools.count(1)

        def allocate(device: Any, nbytes: int) -> Any:
            if next(calls) > room:
                failures.append(nbytes)
                raise OutOfMemory("none left", expected="some", fix="wait")
            return real(device, nbytes)

        with monkeypatch.context() as patch:
            patch.setattr(type(machine.device), "allocate", allocate)
            return slots(self, labels)

    with machine.open() as pipeline:
        with monkeypatch.context() as patch:
            patch.setattr(ConditionCache, "slots", slots_without_memory)
            with pytest.raises(OutOfMemory):
                pipeline([3, 1], SCHEDULE, seed=5)
        assert failures
        got, expected = (each([3, 1], SCHEDULE, seed=5) for each in (pipeline, reference))
        np.testing.assert_array_equal(got.images, expected.images)


def test_on_scale_is_refused_with_a_deadline(machine: Machine) -> None:
    """Run scale by scale, a generation takes longer than the costs say."""
    with machine.open() as pipeline, pytest.raises(InvalidInput, match=r"on_scale.*deadline_ms"):
        pipeline([0], deadline_ms=100, on_scale=lambda step: None)


def test_nothing_stays_on_the_device_after_closing(machine: Machine) -> None:
    pipeline = machine.open()
    pipeline([0], SCHEDULE, seed=1)
    pipeline.close()
    gc.collect()
    assert machine.device.used == 0


def test_memory_does_not_grow(machine: Machine) -> None:
    """Shapes and classes come and go; what is allocated stays below what the kept ones need."""
    with machine.open() as pipeline:
        for _ in range(2):
            for batch in range(1, SHAPES_KEPT + 3):
                pipeline([batch % 5] * batch, SCHEDULE, seed=1)
        generator: Any = pipeline.generator
        assert len(generator._spare) == SHAPES_KEPT
        with machine.device.recorded() as events:
            for seed in range(20):
                pipeline([1, 2], SCHEDULE, seed=seed)
        before = events.count("allocate")
        with machine.device.recorded() as events:
            for seed in range(20):
                pipeline([1, 2], SCHEDULE, seed=seed)
        assert before > 0 and "allocate" not in events and "pinned" not in events


def test_more_classes_than_slots(machine: Machine, reference: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar_runtime.generation.device.CLASSES_KEPT", 3)
    with machine.open() as pipeline:
        for labels in ([0], [1], [2], [0], [4, 3], [1, 2], [0, 1, 2, 3, 4]):
            got, expected = (p(labels, SCHEDULE, seed=9) for p in (pipeline, reference))
            np.testing.assert_array_equal(got.tokens[-1], expected.tokens[-1])


def test_where_capturing_is_refused_a_warning_says_so(
    machine: Machine, reference: FlexVARPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    machine.device.refuse_capture = "operation not permitted"
    with machine.open() as pipeline:
        got = pipeline([3, 1], SCHEDULE, seed=5)
        assert got.timings.mode == "stream"
        assert "cannot be captured as a CUDA graph" in caplog.text and "operation not permitted" in caplog.text
        with machine.device.recorded() as events:
            again = pipeline([3, 1], SCHEDULE, seed=5)
        assert "capture" not in events and events.count("synchronize") == 1
    expected = reference([3, 1], SCHEDULE, seed=5)
    for output in (got, again):
        np.testing.assert_array_equal(output.images, expected.images)


def test_teacher_forced_logits(machine: Machine, reference: FlexVARPipeline) -> None:
    """The loop the proof uses, next inputs computed by the kernel."""
    rng = np.random.default_rng(0)
    schedule = ScaleSchedule.parse(OTHER)
    with (
        machine.open() as pipeline,
        pipeline.generator.loop(Request.of([0, 3], schedule, Guidance(2.0))) as loop,
        reference.generator.loop(Request.of([0, 3], schedule, Guidance(2.0))) as other,
    ):
        previous = None
        for i, (h, w) in enumerate(schedule):
            got, expected = (one.logits(i, previous) for one in (loop, other))
            np.testing.assert_allclose(got, expected, atol=2e-4)
            previous = rng.integers(0, pipeline.model.vocabulary, (2, h, w)).astype(np.int32)


def test_logits_that_are_not_finite_are_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.open() as pipeline:
        pipeline([0, 1], SCHEDULE, seed=1)
        engine = machine.device.engines["step"]  # type: ignore[attr-defined]
        run = engine.run

        def spoiled(addresses: dict[str, int], shapes: dict[str, tuple[int, ...]], memory: tuple[int, int]) -> None:
            run(addresses, shapes, memory)
            if shapes["past_k_0"][0] == 5:  # the third scale
                ctypes.c_float.from_address(addresses["logits"] + 4 * 512 * 11).value = np.nan

        monkeypatch.setattr(engine, "run", spoiled)
        with pytest.raises(ArtifactRefused, match=r"Scale 3 \(3x3\): Row 11"):
            pipeline([0, 1], SCHEDULE, seed=1)
        with pytest.raises(ArtifactRefused, match=r"Scale 3 \(3x3\): Row 11"):
            list(pipeline.iter_scales([0, 1], SCHEDULE, seed=1))
        monkeypatch.setattr(engine, "run", run)
        pipeline([0, 1], SCHEDULE, seed=1)  # nothing of it is left


def test_what_does_not_fit_is_refused_before_it_is_allocated(machine: Machine) -> None:
    with machine.open() as pipeline:
        generator: Any = pipeline.generator
        schedule = ScaleSchedule.parse(SCHEDULE)
        pipeline([0] * 3, SCHEDULE, seed=1)
        generator._drop(0)
        machine.device.size = machine.device.used + generator.bytes_of(Shape(schedule, 3, True))
        pipeline([0] * 3, SCHEDULE, seed=1)
        with machine.device.recorded() as events, pytest.raises(OutOfMemory) as refusal:
            pipeline([0] * 4, SCHEDULE, seed=1)
        assert "allocate" not in events
        assert "at most 3" in refusal.value.fix
        machine.device.size = machine.device.used + 1000
        with pytest.raises(OutOfMemory, match="smaller schedule"):
            pipeline([0], SCHEDULE, seed=1)


def test_buffers_are_counted_exactly(machine: Machine) -> None:
    with machine.open() as pipeline:
        generator: Any = pipeline.generator
        shape = Shape(ScaleSchedule.parse(OTHER), 10, True)
        generator.graph("step")
        before = machine.device.used
        generation = generator._allocate(shape)
        assert generator.bytes_of(shape) == generation.nbytes == machine.device.used - before
        plan = device_plan(machine.bundle, shape)
        assert plan.kv == generation._work["cache"].nbytes and plan.kv + plan.buffers == generation.nbytes
        files = machine.bundle.manifest.files
        graphs = {name: record.size for name, record in files.items() if ".onnx" in name}
        own = graphs.pop("prefill.onnx")
        assert plan.weights == sum(graphs.values())
        edits = device_plan(machine.bundle, shape, prefill=True)
        assert edits.weights == plan.weights + own + files["step.onnx.data"].size  # the step's once more


EDITS: list[tuple[str, dict[str, Any]]] = [
    ("refine", {"strength": 0.5}),
    ("inpaint", {"labels": [1]}),
]


@pytest.mark.parametrize("prefill", [True, False], ids=["one pass", "scale by scale"])
@pytest.mark.parametrize(("task", "options"), EDITS)
def test_edits_are_those_of_the_cpu(
    machine: Machine, reference: FlexVARPipeline, task: str, options: dict[str, Any], prefill: bool
) -> None:
    rng = np.random.default_rng(0)
    factor = machine.bundle.manifest.model.downsampling
    picture = rng.integers(0, 256, (3 * factor, 5 * factor, 3), np.uint8)
    mask = np.zeros(picture.shape[:2], bool)
    mask[2 * factor :, : 2 * factor] = True
    options = {"size": picture.shape[:2], **options}
    if task == "inpaint":
        options = {**options, "mask": mask}
    expected = reference.edit(picture, task, schedule=OTHER, seed=3, **options)
    if not prefill:
        for engine in machine.engines.glob("prefill-*"):
            engine.unlink()
    with machine.open() as pipeline:
        assert pipeline.generator.prefills == prefill
        got = pipeline.edit(picture, task, schedule=OTHER, seed=3, **options)
        again = pipeline.edit(picture, task, schedule=OTHER, seed=3, **options)
    for one, two, three in zip(expected.tokens, got.tokens, again.tokens, strict=True):
        assert np.array_equal(one, two) and np.array_equal(two, three)
    assert np.array_equal(expected.images, got.images)


def test_a_shape_without_profile(machine: Machine) -> None:
    with machine.open() as pipeline:
        with pytest.raises(InvalidInput, match="profile") as refusal:
            pipeline([0] * 13, SCHEDULE, seed=1)
        assert "--max-batch" in refusal.value.fix and str(machine.bundle.path) in refusal.value.fix


def test_an_engine_that_cannot_be_loaded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object, plan: bytes) -> None:
        machine.library.logger.log(1, "magic tag does not match")

    monkeypatch.setattr(machine.library.module.Runtime, "deserialize_cuda_engine", refuse)
    with machine.open() as pipeline, pytest.raises(ArtifactRefused, match="magic tag does not match"):
        pipeline([0], SCHEDULE, seed=1)


def test_two_threads_do_not_share_a_pipeline(machine: Machine) -> None:
    with machine.open() as pipeline, ThreadPoolExecutor(1) as pool:

        def other(_: object) -> None:
            pool.submit(pipeline, [1], SCHEDULE).result()

        with pytest.raises(InvalidInput, match="Another thread"):
            pipeline([0], SCHEDULE, on_scale=other)
        pool.submit(pipeline, [1], SCHEDULE, seed=1).result()  # taking turns is fine


def test_another_thread_does_not_begin_in_the_middle(machine: Machine) -> None:
    """Not even with what a generator does before its first scale."""
    with machine.open() as pipeline, ThreadPoolExecutor(1) as pool:

        def other(_: object) -> None:
            with machine.device.recorded() as events, pytest.raises(InvalidInput, match="Another thread"):
                pool.submit(next, pipeline.iter_scales([1], OTHER)).result()
            assert not events

        pipeline([0], SCHEDULE, on_scale=other)


def test_a_pipeline_closed_between_scales(machine: Machine) -> None:
    pipeline = machine.open()
    scales = pipeline.iter_scales([0], SCHEDULE, seed=1)
    next(scales)
    pipeline.close()
    machine.device.closed = False  # to see what is tried
    with machine.device.recorded() as events, pytest.raises(InvalidInput, match="closed"):
        next(scales)
    assert not [event for event in events if event.startswith("execute")]


def test_closing_goes_on_after_the_device_has_failed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = machine.open()
    pipeline([0], SCHEDULE, seed=1)

    def fail() -> None:
        raise DeviceFailed("an illegal address", expected="a legal one", fix="none")

    monkeypatch.setattr(machine.device, "synchronize", fail)
    pipeline.close()
    assert machine.device.closed


def test_images_that_no_engine_takes_at_once_are_decoded_and_encoded_in_parts(
    machine: Machine, reference: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrtGraph, "most_images", property(lambda _: 2))
    tokens = np.random.default_rng(0).integers(0, 512, (5, 3, 5)).astype(np.int32)
    with machine.open() as pipeline:
        pixels = pipeline.decode(tokens)
        np.testing.assert_array_equal(pixels, reference.decode(tokens))
        np.testing.assert_array_equal(pipeline.encode(pixels), reference.encode(pixels))


def test_generations_that_are_not_captured_are_freed(machine: Machine) -> None:
    machine.device.refuse_capture = "not permitted"
    with machine.open() as pipeline:
        pipeline([0], SCHEDULE, seed=1)
        generator: Any = pipeline.generator
        generation = weakref.ref(next(iter(generator._spare.values())))
        gc.disable()
        try:
            generator._drop(0)
            assert generation() is None
        finally:
            gc.enable()
