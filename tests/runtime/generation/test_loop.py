"""What the runtime asks of a backend, seen by one that records: which memory is bound, opened, kept and freed."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_runtime import (
    ArtifactRefused,
    BackendUnavailable,
    Bundle,
    FlexVARPipeline,
    Guidance,
    InvalidInput,
    OutOfMemory,
    ScaleSchedule,
)
from flexvar_runtime.backends.base import Backend, Bound
from flexvar_runtime.backends.ort.memory import ORT
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.generation import conditions
from flexvar_runtime.generation.conditions import row_groups
from flexvar_runtime.generation.host import CLASSES_KEPT
from flexvar_runtime.memory.library import LibraryMemory
from flexvar_runtime.memory.plan import IMAGES_PER_RUN, PUBLISHED_DECODER, MemoryPlan, plan
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import GRAPHS, TABLES_FILE, graph_specs, modulation_names, new_names, past_names
from flexvar_runtime.model.tables import Tables
from flexvar_runtime.model.tensors import GraphSpec, host_dtype
from flexvar_runtime.request import Request

Array = NDArray[Any]
DEPTH, VOCABULARY, CLASSES, NULL = 3, 16, 100, 100
SCHEDULE = "1_2_2x3_3_4x5"
MODEL = ModelFacts(
    depth=DEPTH,
    width=8,
    heads=2,
    head_size=4,
    classes=CLASSES,
    class_names=None,
    null_class=NULL,
    vocabulary=VOCABULARY,
    code_dim=3,
    downsampling=2,
    value_range=(-1.0, 1.0),
    position_side=4,
)


@dataclass(frozen=True)
class Run:
    """One run of a graph: the very arrays that were bound, and the values of the inputs at that time."""

    graph: str
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    values: dict[str, Array]


@dataclass
class RecordingGraph:
    backend: RecordingBackend
    name: str
    spec: GraphSpec
    once: bool
    closed: bool = False

    def bind(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> Bound:
        raise NotImplementedError("what runs on the host is run, not bound")

    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        assert not self.closed
        self._check(inputs, outputs)
        if self.backend.recording:
            values = {name: array.copy() for name, array in inputs.items()}
            self.backend.runs.append(Run(self.name, dict(inputs), dict(outputs), values))
        number = len(self.backend.runs)
        for i, (name, array) in enumerate(outputs.items()):
            if name == "logits":
                array[:] = np.random.default_rng(number).standard_normal(array.shape, np.float32)
            elif name == "image":  # its tokens, so that order and batch can be seen
                array[:] = inputs["tokens"][:, :1, :1][:, None] / VOCABULARY
            elif name == "latent":
                array[:] = inputs["image"][:, :1, :1, :1]
            elif self.name == "condition":
                array[:] = inputs["labels"].reshape(-1, *[1] * (array.ndim - 1)) + i / 10
            else:
                array[:] = 1000 * number + i

    def _check(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Names, types and shapes are those of the declaration, and a named axis has one size."""
        sizes: dict[str, int] = {}
        for tensors, arrays in ((self.spec.inputs, inputs), (self.spec.outputs, outputs)):
            assert {tensor.name for tensor in tensors} == set(arrays)
            for tensor in tensors:
                array = arrays[tensor.name]
                assert array.dtype == host_dtype(tensor.dtype) and array.ndim == len(tensor.axes)
                assert array.flags.c_contiguous
                for axis, size in zip(tensor.axes, array.shape, strict=True):
                    base, _, factor = str(axis).partition("_x")
                    expected = axis if isinstance(axis, int) else sizes.setdefault(base, size // int(factor or 1))
                    assert size == expected * int(factor or 1) if isinstance(axis, str) else size == axis

    def holds(self, size: tuple[int, int]) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


@dataclass
class RecordingBackend:
    """NumPy in place of a device: nothing is computed, everything is noted (runs only while `recording`)."""

    name: str = "recording"
    precisions: frozenset[str] = frozenset({"fp32"})
    threads: int = 1
    labels_per_run: int = 2
    maps_weights: bool = True
    device: None = None
    available: int | None = None
    recording: bool = True
    graphs: list[RecordingGraph] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> RecordingGraph:
        assert bundle.graph_file(graph).read_bytes() == b"graph"
        self.graphs.append(RecordingGraph(self, graph, bundle.graph(graph), once))
        return self.graphs[-1]

    def prepared(self, bundle: Bundle, graph: str) -> bool:
        return True

    def libraries(self, precision: str) -> dict[str, LibraryMemory]:
        return dict.fromkeys(GRAPHS, ORT)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        self.arrays.append(np.empty(shape, host_dtype(dtype)))
        return self.arrays[-1]

    def upload(self, host: Array) -> Array:
        return np.ascontiguousarray(host)

    def download(self, array: Array) -> Array:
        return array

    def available_bytes(self) -> int | None:
        return self.available

    def close(self) -> None:
        self.arrays.clear()

    def runs_of(self, graph: str) -> list[Run]:
        return [run for run in self.runs if run.graph == graph]

    def opened(self, graph: str) -> list[RecordingGraph]:
        return [opened for opened in self.graphs if opened.name == graph]


Open = Callable[..., tuple[FlexVARPipeline, RecordingBackend]]


@pytest.fixture
def open_pipeline(tmp_path: Path, manifest: Manifest) -> Open:
    """A pipeline on a recording backend: over a sealed bundle whose graphs hold no graph."""

    def build(model: ModelFacts = MODEL, **options: Any) -> tuple[FlexVARPipeline, RecordingBackend]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.bundle"
        specs = graph_specs(model, "fp32")
        rng = np.random.default_rng(0)
        shapes = (
            (model.vocabulary, model.code_dim),
            (model.width, model.position_side, model.position_side),
            (model.width,),
        )
        with write_bundle(path) as directory:
            for spec in specs.values():
                (directory / spec.file).write_bytes(b"graph")
            Tables(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes)).save(directory / TABLES_FILE)
            seal(directory, replace(manifest, model=model, graphs=specs, largest_activation={}))
        backend = RecordingBackend(**options)
        return FlexVARPipeline(Bundle.open(path), backend), backend

    return build


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def test_the_recording_backend_is_a_backend() -> None:
    backend: Backend = RecordingBackend()
    assert backend.name == "recording"


# Keys and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [Guidance(2.5), Guidance(0)], ids=["guided", "unguided"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_past_is_a_prefix_and_the_new_the_tail_of_one_buffer(
    open_pipeline: Open, guidance: Guidance, images: int
) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1] * images, SCHEDULE, guidance))
    sequences, tokens = images * (2 if guidance.scale else 1), ScaleSchedule.parse(SCHEDULE).tokens
    caches = [array for array in backend.arrays if array.ndim == 5]
    assert [cache.shape for cache in caches] == [(2 * DEPTH, tokens, sequences, 2, 4)]  # one allocation, all scales
    [cache] = caches
    row, past = cache.strides[1], 0
    steps = backend.runs_of("step")
    assert len(steps) == 5
    for run, (h, w) in zip(steps, ScaleSchedule.parse(SCHEDULE), strict=True):
        for i, (before, after) in enumerate(zip(past_names(DEPTH), new_names(DEPTH), strict=True)):
            old, new = run.inputs[before], run.outputs[after]
            assert old.shape == (past, sequences, 2, 4) and new.shape == (h * w, sequences, 2, 4)
            assert address(old) == address(cache[i]) and address(new) == address(cache[i]) + past * row
            assert np.shares_memory(new, cache) and (past == 0 or np.shares_memory(old, cache))
        past += h * w
    assert past == tokens


def check_past(steps: list[Run]) -> None:
    """The past of every step of one generation is what the steps before it wrote, block by block."""
    for past, new in zip(past_names(DEPTH), new_names(DEPTH), strict=True):
        written: list[Array] = []
        for run in steps:
            if written:
                np.testing.assert_array_equal(run.values[past], np.concatenate(written))
            written.append(run.outputs[new].copy())
        assert len({float(array.flat[0]) for array in written}) == len(steps)  # every scale wrote its own


def test_the_past_holds_what_the_steps_before_wrote(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1, 2], SCHEDULE))
    check_past(backend.runs_of("step"))


def test_logits_are_written_where_they_are_read(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([1, 2], SCHEDULE))
    [buffer] = [array for array in backend.arrays if array.shape == (2 * 20 * VOCABULARY,)]
    for run, (h, w) in zip(backend.runs_of("step"), ScaleSchedule.parse(SCHEDULE), strict=True):
        assert run.outputs["logits"].shape == (2, h * w, VOCABULARY)
        assert address(run.outputs["logits"]) == address(buffer)


def test_a_schedule_may_shrink(open_pipeline: Open) -> None:
    """The buffer of logits holds the largest scale, wherever it comes."""
    pipeline, backend = open_pipeline()
    steps = list(pipeline.iter_scales([1, 2], "1_4x5_2_3"))
    assert [step.tokens.shape for step in steps] == [(2, 1, 1), (2, 4, 5), (2, 2, 2), (2, 3, 3)]
    check_past(backend.runs_of("step"))
    assert [array.shape for array in backend.arrays if array.ndim == 1] == [(2 * 20 * VOCABULARY,)]


def test_nothing_large_is_copied_from_scale_to_scale(open_pipeline: Open) -> None:
    """A whole generation allocates less than the share of one block's keys, once its buffers are there."""
    schedule, labels = "1" + "_4" * 30, [1, 2, 3, 4]
    model = replace(MODEL, depth=8, width=64, heads=8, head_size=8)
    pipeline, backend = open_pipeline(model, recording=False)
    list(pipeline.iter_scales(labels, schedule))
    cache = next(array for array in backend.arrays if array.ndim == 5)
    groups = row_groups(pipeline.bundle.graph("condition"))
    kept = {(len(group.names), rows, *group.row) for group in groups for rows in (CLASSES_KEPT, 2 * len(labels))}
    large = [array for array in backend.arrays if array.nbytes > 100_000 and array.shape not in kept]
    assert len(large) == 1
    tracemalloc.start()
    try:
        list(pipeline.iter_scales(labels, schedule))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cache.nbytes > 15_000_000
    assert peak < cache.nbytes / 16


# Inputs of a step ----------------------------------------------------------------------------------------------------


def test_inputs_of_every_scale(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    steps = list(pipeline.iter_scales([5, 9], SCHEDULE, Guidance(2.0, "ramp", 4)))
    runs, tables = backend.runs_of("step"), pipeline.generator.tables
    for i, (run, t) in enumerate(zip(runs, [0, 0.5, 1, 1.5, 2], strict=True)):
        np.testing.assert_array_equal(run.values["t"], np.full(2, t, np.float32))
        np.testing.assert_array_equal(run.values["cond_rows"], [0, 1])
        np.testing.assert_array_equal(run.values["uncond_rows"], [2, 3])
        for k, name in enumerate((*modulation_names(DEPTH), "head_scale", "head_shift")):
            rows = np.float32([5, 9, NULL, NULL]) + np.float32(k / 10)
            np.testing.assert_allclose(run.values[name][:, 0, 0], rows, rtol=1e-6, err_msg=name)
        if i == 0:
            assert not run.values["codes"].any()
            np.testing.assert_array_equal(
                run.values["offset"][:, 0, 0], np.float32([5, 9, NULL, NULL]) + np.float32(2.0)
            )
        else:
            codes = tables.next_codes(steps[i - 1].tokens, steps[i].size)
            np.testing.assert_array_equal(run.values["codes"], np.concatenate([codes, codes]))
            np.testing.assert_array_equal(run.values["offset"], [tables.offset(*steps[i].size)] * 4)


@pytest.mark.parametrize("guidance", [Guidance(0), Guidance(1, "constant"), Guidance(0, "ramp", 1)])
def test_guidance_off_is_a_single_batch(open_pipeline: Open, guidance: Guidance) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], SCHEDULE, guidance))
    for run in backend.runs_of("step"):
        assert run.inputs["gamma1_0"].shape[0] == run.inputs["codes"].shape[0] == 2
        np.testing.assert_array_equal(run.values["uncond_rows"], [0, 1])
        np.testing.assert_array_equal(run.values["t"], [0, 0])
        np.testing.assert_array_equal(run.values["gamma1_0"][:, 0, 0], [5, 9])
    asked = np.concatenate([run.values["labels"] for run in backend.runs_of("condition")])
    assert NULL not in asked
    assert {run.outputs["new_k_0"].shape[1] for run in backend.runs_of("step")} == {2}


@pytest.mark.parametrize("guidance", [Guidance(2.5), Guidance(4, "constant"), Guidance(0, "constant")])
def test_guidance_on_is_a_double_batch(open_pipeline: Open, guidance: Guidance) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], SCHEDULE, guidance))
    assert {run.inputs["gamma1_0"].shape[0] for run in backend.runs_of("step")} == {4}


def test_the_ramp_of_one_scale_is_off(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    list(pipeline.iter_scales([5, 9], "1", Guidance(4)))
    assert [run.inputs["codes"].shape[0] for run in backend.runs_of("step")] == [2]


# The condition graph -------------------------------------------------------------------------------------------------


def test_the_condition_graph_is_closed_before_the_first_step(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    steps = pipeline.iter_scales([1, 2, 1], SCHEDULE)
    assert not backend.graphs  # nothing is opened before it is needed
    next(steps)
    [condition] = backend.opened("condition")
    assert condition.once and condition.closed
    [step] = backend.opened("step")
    assert not step.once and not step.closed


def test_a_class_is_asked_for_once(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    pipeline([1, 2, 1], SCHEDULE)
    pipeline([2, 1], SCHEDULE)
    assert len(backend.opened("condition")) == 1
    pipeline([2, 3], SCHEDULE)
    asked = [run.values["labels"].tolist() for run in backend.runs_of("condition")]
    assert asked == [[1, 2], [NULL, NULL], [3, NULL]]
    assert all(graph.closed for graph in backend.opened("condition"))


def test_a_class_is_always_run_in_a_batch_of_the_same_size(open_pipeline: Open) -> None:
    """So that a label's row cannot depend on how many it was asked with."""
    pipeline, backend = open_pipeline()
    pipeline(list(range(7)), SCHEDULE, Guidance(0))
    pipeline([20], SCHEDULE, Guidance(0))
    assert {run.inputs["labels"].shape for run in backend.runs_of("condition")} == {(backend.labels_per_run,)}


def asked(backend: RecordingBackend, first_run: int) -> list[int]:
    """The classes of the runs of the condition graph from `first_run` on."""
    return sorted(label for run in backend.runs_of("condition")[first_run:] for label in run.values["labels"])


def test_more_classes_than_are_remembered(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    labels = [*range(CLASSES_KEPT + 8)]
    pipeline(labels, "1_2", Guidance(0))
    [first, _] = backend.runs_of("step")
    np.testing.assert_array_equal(first.values["gamma1_0"][:, 0, 0], labels)
    runs = len(backend.runs_of("condition"))
    for again in ([0, 1], [1, 0], labels[2:], labels):
        pipeline(again, "1_2", Guidance(0))
    assert asked(backend, runs) == []  # the larger request made room, and nothing was forgotten
    pipeline([50, 51], "1_2", Guidance(0))
    pipeline(labels[2:], "1_2", Guidance(0))
    assert asked(backend, runs) == [50, 51]  # they took the slots of 0 and 1, which were unused longest
    pipeline([1, 0], "1_2", Guidance(0))
    assert asked(backend, runs) == [0, 1, 50, 51]


def test_a_large_request_gives_its_slots_back(open_pipeline: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "MOST_GROWTH", 1)
    pipeline, backend = open_pipeline()
    labels = [*range(CLASSES_KEPT + 8)]
    pipeline(labels, "1_2", Guidance(0))
    runs = len(backend.runs_of("condition"))
    for again in ([0, 1], [1, 0], labels[2:CLASSES_KEPT]):
        pipeline(again, "1_2", Guidance(0))
    assert asked(backend, runs) == labels[:CLASSES_KEPT]  # computed once more, into as many slots as are kept


def test_the_condition_graph_is_closed_after_a_failure(open_pipeline: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OutOfMemory("it", expected="less", fix="wait")

    pipeline, backend = open_pipeline()
    with monkeypatch.context() as patch:
        patch.setattr(RecordingGraph, "run", fail)
        with pytest.raises(OutOfMemory):
            pipeline([1], SCHEDULE)
    assert [graph.closed for graph in backend.graphs] == [True]
    pipeline([1], SCHEDULE)


@pytest.mark.parametrize("failing", range(1, 7))
def test_after_a_failed_allocation_the_call_can_be_made_again(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """A call allocates six arrays: conditions, their rows and the buffers of the loop."""
    pipeline, backend = open_pipeline()
    empty, calls = RecordingBackend.empty, itertools.count(1)

    def none_left(self: RecordingBackend, shape: tuple[int, ...], dtype: str) -> Array:
        if next(calls) == failing:
            raise OutOfMemory("it", expected="less", fix="wait")
        return empty(self, shape, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(RecordingBackend, "empty", none_left)
        with pytest.raises(OutOfMemory):
            pipeline([1], SCHEDULE)
    backend.runs.clear()
    pipeline([1], SCHEDULE)
    first = backend.runs_of("step")[0]
    np.testing.assert_array_equal(first.values["gamma1_0"][:, 0, 0], [1, NULL])


def test_a_dropped_pipeline_is_freed_at_once(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    pipeline([1], SCHEDULE)
    generator = weakref.ref(pipeline.generator)
    gc.disable()
    try:
        del pipeline
        assert generator() is None
    finally:
        gc.enable()


def test_given_tokens_are_recorded_by_force(open_pipeline: Open) -> None:
    pipeline, _ = open_pipeline()
    request = Request.of([1], ScaleSchedule.parse(SCHEDULE), Guidance(2.0))
    given = [np.zeros((1, 1, 1), np.int32), np.zeros((1, 2, 2), np.int32)]
    with pipeline.generator.loop(request) as loop:
        loop.force(given)
        assert len(loop.tokens) == len(loop.times) == 2
        assert [spent.size for _, spent in loop] == [(2, 3), (3, 3), (4, 5)]


# Buffers -------------------------------------------------------------------------------------------------------------


def cache_addresses(backend: RecordingBackend) -> list[int]:
    return [address(run.inputs["past_k_0"]) for run in backend.runs_of("step")]


def caches(backend: RecordingBackend) -> int:
    return sum(array.ndim == 5 for array in backend.arrays)


def test_buffers_serve_the_next_generation_of_the_same_shape(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    for labels in ([1, 2], [3, 4], [1, 1]):
        pipeline(labels, SCHEDULE, Guidance(2.5))
    assert caches(backend) == 1 and len(set(cache_addresses(backend))) == 1
    assert len(backend.opened("step")) == len(backend.opened("decode")) == 1


@pytest.mark.parametrize(
    "other",
    [([1, 2, 3], SCHEDULE, Guidance(2.5)), ([1, 2], "1_2_2x3_3_5x4", Guidance(2.5)), ([1, 2], SCHEDULE, Guidance(0))],
    ids=["images", "schedule", "guidance"],
)
def test_another_shape_has_other_buffers(open_pipeline: Open, other: Any) -> None:
    pipeline, backend = open_pipeline()
    pipeline([1, 2], SCHEDULE, Guidance(2.5))
    pipeline(*other)
    assert caches(backend) == 2
    assert pipeline.generator._spare is not None
    assert address(pipeline.generator._spare.cache) == cache_addresses(backend)[-1]  # one set is kept, the last


def test_two_generations_at_once_share_no_buffer(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    pipeline([1, 2], SCHEDULE)  # leaves buffers of this shape to be taken
    backend.runs.clear()
    first, second = (pipeline.iter_scales([1, 2], SCHEDULE, seed=seed) for seed in (1, 2))
    for _ in zip(first, second, strict=True):
        pass
    addresses = cache_addresses(backend)
    assert len(set(addresses[::2])) == len(set(addresses[1::2])) == 1
    assert addresses[0] != addresses[1]
    for turn in (0, 1):
        check_past(backend.runs_of("step")[turn::2])
    for _ in range(3):
        pipeline([1, 2], SCHEDULE)
    assert caches(backend) == 2  # nothing grows


@pytest.mark.parametrize("end", ["close", "exception", "on_scale"])
def test_a_generation_that_was_cut_short_gives_its_buffers_back(open_pipeline: Open, end: str) -> None:
    pipeline, backend = open_pipeline()
    if end == "on_scale":

        def cancel(step: Any) -> None:
            if step.index == 2:
                raise KeyError("cancelled")

        with pytest.raises(KeyError, match="cancelled"):
            pipeline([1], SCHEDULE, on_scale=cancel)
    else:
        steps = pipeline.iter_scales([1], SCHEDULE)
        next(steps), next(steps)
        if end == "close":
            steps.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(KeyError):
                steps.throw(KeyError("cancelled"))  # type: ignore[attr-defined]
    backend.runs.clear()
    pipeline([1], SCHEDULE)
    assert caches(backend) == 1
    assert [len(run.inputs["past_k_0"]) for run in backend.runs_of("step")] == [0, 1, 5, 11, 20]  # from the start


def test_close_frees_everything(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    pipeline([1], SCHEDULE)
    pipeline.encode(np.zeros((4, 4, 3), np.uint8))
    steps = pipeline.iter_scales([1], SCHEDULE)
    next(steps)
    pipeline.close()
    pipeline.close()
    assert {graph.name for graph in backend.graphs} == {"condition", "step", "decode", "encode"}
    assert all(graph.closed for graph in backend.graphs)
    steps.close()  # type: ignore[attr-defined]
    assert pipeline.generator._spare is None
    for use in (
        lambda: pipeline([1], SCHEDULE),
        lambda: list(pipeline.iter_scales([1], SCHEDULE)),
        lambda: pipeline.decode(np.zeros((1, 2, 2), int)),
        lambda: pipeline.encode(np.zeros((4, 4, 3), np.uint8)),
        lambda: pipeline.warmup(SCHEDULE),
    ):
        with pytest.raises(InvalidInput, match="closed"):
            use()


def test_what_does_not_fit_is_refused_with_what_would(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()

    def planned(images: int, guided: bool = True) -> MemoryPlan:
        manifest = pipeline.bundle.manifest
        return plan(
            manifest, ScaleSchedule.parse(SCHEDULE), images, guided, dict.fromkeys(GRAPHS, ORT), decoded_at_once=1
        )

    backend.available = planned(4).needed() - 1
    with pytest.raises(OutOfMemory) as refusal:
        list(pipeline.iter_scales([1] * 8, SCHEDULE))
    assert f"batch of 8 at schedule {SCHEDULE}" in refusal.value.got and "at most 3" in refusal.value.fix
    assert not backend.graphs and not caches(backend)  # nothing was opened for it
    assert len(list(pipeline.iter_scales([1] * 3, SCHEDULE))) == 5
    assert len(list(pipeline.iter_scales([1] * 4, SCHEDULE, Guidance(0)))) == 5  # half the sequences
    backend.available = planned(1).needed({"step"}) - 1
    with pytest.raises(OutOfMemory, match="smaller schedule"):
        list(pipeline.iter_scales([1] * 2, SCHEDULE))


# Decoder and encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "batches"), [(None, [8, 8, 3]), (6.5, [3] * 6 + [1]), (2.0, [1] * 19), (1.0, [1] * 19), (1e9, [8, 8, 3])]
)
def test_the_decoder_runs_in_batches_that_fit(open_pipeline: Open, fit: float | None, batches: list[int]) -> None:
    pipeline, backend = open_pipeline()
    assert len(pipeline.decode(np.zeros((1, 1, 1), int))) == 1  # opened: its weights are held
    backend.runs.clear()
    one = ORT.image(pipeline.bundle.manifest, (2, 3), PUBLISHED_DECODER)
    backend.available = None if fit is None else int(fit * one)
    tokens = (np.arange(19)[:, None, None] % VOCABULARY).repeat(2, axis=1).repeat(3, axis=2)
    images = pipeline.decode(tokens)
    assert [len(run.inputs["tokens"]) for run in backend.runs_of("decode")] == batches
    assert len({address(run.outputs["image"]) for run in backend.runs_of("decode")}) == 1
    assert images.shape == (19, 4, 6, 3) and max(batches) <= IMAGES_PER_RUN
    np.testing.assert_array_equal(
        images[:, 0, 0, 0], (np.arange(19) % VOCABULARY / VOCABULARY * 127.5 + 128).astype(int)
    )


def test_an_image_that_does_not_fit(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    backend.available = ORT.image(pipeline.bundle.manifest, (2, 3), PUBLISHED_DECODER)
    with pytest.raises(OutOfMemory, match="Decoding an image of 2x3"):
        pipeline.decode(np.zeros((1, 2, 3), int))
    with pytest.raises(OutOfMemory, match="Encoding an image of 2x3"):
        pipeline.encode(np.zeros((4, 6, 3), np.uint8))


def test_the_encoder_runs_in_batches_that_fit(open_pipeline: Open) -> None:
    pipeline, backend = open_pipeline()
    pipeline.encode(np.zeros((19, 4, 6, 3), np.uint8))
    assert [len(run.inputs["image"]) for run in backend.runs_of("encode")] == [8, 8, 3]


# Bundles that do not go with it --------------------------------------------------------------------------------------


def test_a_precision_that_the_backend_lacks(open_pipeline: Open) -> None:
    with pytest.raises(BackendUnavailable) as refusal:
        open_pipeline(precisions=frozenset({"fp16", "bf16"}))
    assert "recording" in refusal.value.got and "fp32" in refusal.value.got and "ort-cpu" in refusal.value.fix


@pytest.mark.parametrize(
    "change",
    [
        lambda step: replace(step, outputs=step.outputs[:-1]),
        lambda step: replace(step, outputs=step.outputs[:1]),
        lambda step: replace(step, inputs=step.inputs[1:]),
        lambda step: replace(step, inputs=step.inputs[::-1]),
        lambda step: replace(step, outputs=(replace(step.outputs[0], dtype="float16"), *step.outputs[1:])),
        lambda step: replace(step, file="decode.onnx"),
    ],
)
def test_a_graph_with_other_tensors(
    open_pipeline: Open, monkeypatch: pytest.MonkeyPatch, change: Callable[[GraphSpec], GraphSpec]
) -> None:
    pipeline, backend = open_pipeline()
    manifest = pipeline.bundle.manifest
    graphs = manifest.graphs | {"step": change(manifest.graphs["step"])}
    bundle = replace(pipeline.bundle, manifest=replace(manifest, graphs=graphs))
    with pytest.raises(ArtifactRefused, match="graph step"):
        FlexVARPipeline(bundle, backend)


@pytest.mark.parametrize("defaults", [{"schedule": "2_3"}, {"schedule": "1_2000"}, {"greedy_scales": "0"}])
def test_defaults_that_cannot_be_used(open_pipeline: Open, defaults: dict[str, Any]) -> None:
    pipeline, backend = open_pipeline()
    manifest = pipeline.bundle.manifest
    bundle = replace(pipeline.bundle, manifest=replace(manifest, defaults=replace(manifest.defaults, **defaults)))
    with pytest.raises(ArtifactRefused, match="default of the bundle"):
        FlexVARPipeline(bundle, backend)


def test_a_graph_that_takes_weights_from_unchecked_files(open_pipeline: Open, tmp_path: Path) -> None:
    """`engines/` lies in the bundle but outside the manifest."""
    pipeline, _ = open_pipeline()
    path = pipeline.bundle.path / "step.onnx"
    for name in (b"engines/w.bin", b"./Engines/w.bin", b"a/../engines/../engines/w.bin"):
        path.write_bytes(b"\x0a\x08location\x12" + bytes([len(name)]) + name)
        with pytest.raises(ArtifactRefused, match=r"step\.onnx.*engines/"):
            list(pipeline.iter_scales([1], SCHEDULE))
