"""The generator on a host: buffers, runs of decoder and encoder, and bundles that it refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from recording_backend import SCHEDULE, VOCABULARY, Open, RecordingBackend, address, check_past

from flexvar_runtime import (
    ArtifactRefused,
    BackendUnavailable,
    FlexVARPipeline,
    Guidance,
    InvalidInput,
    OutOfMemory,
    ScaleSchedule,
)
from flexvar_runtime.backends.ort.memory import ORT
from flexvar_runtime.memory.plan import IMAGES_PER_RUN, PUBLISHED_DECODER, MemoryPlan, plan
from flexvar_runtime.model.signatures import GRAPHS
from flexvar_runtime.model.tensors import GraphSpec

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
