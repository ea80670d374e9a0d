"""Torch modules behind the runtime's device path, on a device that computes on the host.

What is enqueued there runs when somebody waits, and a capture runs nothing: a replay sees what lies in memory then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeDevice

from flexvar_bench.gpu.parity import parity
from flexvar_bench.gpu.torch_backend import TorchBackend, TorchBound, TorchGraph
from flexvar_export.bundle import TORCH_PRECISIONS
from flexvar_export.onnx_graphs import call_arguments
from flexvar_export.proof import Proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle, FlexVARPipeline, Guidance, InvalidInput, Sampling
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.model.signatures import CONDITION, DECODE, PREFILL, STEP

Model = tuple[FlexVAR, Tokenizer]
SCHEDULE, OTHER = "1_2_3_4", "1_2x3_4x3_3x5"


@pytest.fixture
def pipeline(device: FakeDevice, tiny_bundle: Path, tiny_model: Model) -> Iterator[FlexVARPipeline]:
    """The fp32 bundle on the backend."""
    backend = TorchBackend(device, *tiny_model, torch.float32)
    with FlexVARPipeline(Bundle.open(tiny_bundle), backend) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as opened:
        yield opened


def equal(ones: Any, others: Any) -> bool:
    """Whether two outputs have the same tokens at every scale."""
    return all(np.array_equal(one, other) for one, other in zip(ones.tokens, others.tokens, strict=True))


# What it computes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_graph_is_within_its_gate(
    device: FakeDevice, tiny_bundles: Callable[[str], Path], tiny_model: Model, proof: Proof, precision: str
) -> None:
    """Teacher-forced logits and the other graphs against the reference, 1e-5 in fp32; tokens that rounding explains."""
    backend = TorchBackend(device, *tiny_model, TORCH_PRECISIONS[precision])
    with FlexVARPipeline(Bundle.open(tiny_bundles(precision)), backend) as pipeline:
        found = parity(pipeline, proof)
    assert found["passed"], found["failed"]
    assert found["teacher_forced_tokens"]["holds"]
    assert found["again_equal"] == found["scale_by_scale_equal"] == 1


@pytest.mark.parametrize(
    ("labels", "schedule", "options"),
    [
        ([3, 1], SCHEDULE, {}),
        ([2], SCHEDULE, {"guidance": Guidance(0)}),
        ([1, 1, 4], OTHER, {"guidance": Guidance(3.0, "constant"), "sampling": Sampling(top_k=5, top_p=0.5)}),
    ],
)
def test_the_tokens_of_ort_cpu(
    pipeline: FlexVARPipeline, reference: FlexVARPipeline, labels: list[int], schedule: str, options: dict[str, Any]
) -> None:
    """Torch and ONNX Runtime round differently: sums of probabilities differ by 1e-5 at the most. Another token comes
    only where a draw lies that close to the edge between two, and none of these 576 draws does."""
    for seed in (0, 1, 2**64 - 1):
        got = pipeline(labels, schedule, seed=seed, keep_decoded=True, **options)
        expected = reference(labels, schedule, seed=seed, keep_decoded=True, **options)
        assert got.timings.mode == "cuda-graph" and equal(got, expected)
        assert got.decoded is not None and expected.decoded is not None
        np.testing.assert_allclose(got.decoded, expected.decoded, atol=1e-4)


@pytest.mark.parametrize(("task", "options"), [("refine", {"strength": 0.5}), ("inpaint", {"labels": [1]})])
def test_edits_are_those_of_ort_cpu(
    device: FakeDevice, pipeline: FlexVARPipeline, reference: FlexVARPipeline, task: str, options: dict[str, Any]
) -> None:
    """Whole scales that are given go through the prefill graph; of an inpainted scale a part is given."""
    factor = pipeline.model.downsampling
    picture = np.random.default_rng(0).integers(0, 256, (3 * factor, 5 * factor, 3), np.uint8)
    options = {"size": picture.shape[:2], "schedule": OTHER, "seed": 3, **options}
    if task == "inpaint":
        mask = np.zeros(picture.shape[:2], bool)
        mask[2 * factor :, : 2 * factor] = True
        options["mask"] = mask
    with device.recorded() as events:
        got = pipeline.edit(picture, task, **options)
    assert events.count(f"run {PREFILL}") == (task == "refine") and "capture" not in events
    assert equal(got, reference.edit(picture, task, **options))


# Capture and replay ---------------------------------------------------------------------------------------------------


def test_one_capture_serves_all_seeds_classes_and_guidance_weights(
    device: FakeDevice, pipeline: FlexVARPipeline
) -> None:
    """Replays equal runs scale by scale, in which every graph is enqueued anew, bit for bit."""
    requests = [
        ([0, 1], Guidance(2.5), 0),
        ([0, 1], Guidance(2.5), 2**64 - 1),
        ([4, 2], Guidance(2.5), 0),
        ([0, 1], Guidance(4.0, "constant"), 0),
        ([3, 3], Guidance(0.5), 7),
    ]
    with device.recorded() as events:
        replayed = [pipeline(labels, SCHEDULE, guidance, seed=seed) for labels, guidance, seed in requests]
    assert events.count("capture") == 1 and events.count("replay") == len(requests)
    captured = events[events.index("capture") : events.index("captured")]
    assert captured.count(f"run {STEP}") == 4 and captured.count(f"run {DECODE}") == 1
    after = events[events.index("captured") :]
    assert f"run {STEP}" not in after and f"run {DECODE}" not in after
    assert len({output.images.tobytes() for output in replayed}) == len(requests)
    for (labels, guidance, seed), whole in zip(requests, replayed, strict=True):
        with device.recorded() as events:
            scales = list(pipeline.iter_scales(labels, SCHEDULE, guidance, seed=seed))
            assert events.count(f"run {STEP}") == 4 and "replay" not in events
        assert all(np.array_equal(one, scale.tokens) for one, scale in zip(whole.tokens, scales, strict=True))
        assert np.array_equal(whole.images, scales[-1].preview())


def test_another_shape_is_another_capture_other_sampling_is_not(device: FakeDevice, pipeline: FlexVARPipeline) -> None:
    def captures(labels: list[int], schedule: str, **options: Any) -> int:
        with device.recorded() as events:
            pipeline(labels, schedule, seed=1, **options)
        return events.count("capture")

    sampling = Sampling(top_k=5)
    assert captures([0], SCHEDULE) == 1
    assert captures([0], SCHEDULE, sampling=sampling) == 0
    assert captures([0, 1], SCHEDULE) == 1
    assert captures([0], OTHER) == 1
    assert captures([2], SCHEDULE) == captures([2], SCHEDULE, sampling=sampling) == captures([2], OTHER) == 0


# Bindings -------------------------------------------------------------------------------------------------------------


def test_arrays_are_bound_in_place(pipeline: FlexVARPipeline) -> None:
    """A run sees inputs as they are then, and writes the outputs that are bound."""
    backend, graph = pipeline.backend, pipeline.generator.graph(CONDITION)
    labels = backend.upload(np.array([0, 0], np.int32))
    first_input = backend.empty((2, 1, pipeline.model.width), "float32")
    bound = graph.bind({"labels": labels}, {"first_input": first_input})
    backend.device.write(labels, changed := np.array([3, 1], np.int32))
    bound.run()
    expected = pipeline.generator.condition(changed.tolist())["first_input"]
    np.testing.assert_array_equal(backend.download(first_input), expected)
    bound.close()


def test_what_does_not_fit_is_refused(
    device: FakeDevice, pipeline: FlexVARPipeline, tiny_bundle: Path, tiny_model: Model
) -> None:
    backend, graph = pipeline.backend, pipeline.generator.graph(DECODE)
    wrong = backend.upload(np.zeros((1, 2, 2), np.float32))
    image = backend.empty((1, 3, 8, 8), "float32")
    with pytest.raises(InvalidInput, match="tokens"):
        graph.bind({"tokens": wrong}, {"image": image})
    with pytest.raises(BackendUnavailable, match="torch-modules"):
        FlexVARPipeline(Bundle.open(tiny_bundle), TorchBackend(device, *tiny_model, torch.float16))
    graph.close()
    tokens = backend.upload(np.zeros((1, 2, 2), np.int32))
    with pytest.raises(InvalidInput, match="decode"):
        graph.run({"tokens": tokens}, {"image": image})


# These tests can fail -------------------------------------------------------------------------------------------------


def test_a_weight_read_when_work_is_enqueued_is_noticed(
    pipeline: FlexVARPipeline, reference: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a module would read it that takes the guidance weight to the host: the capture holds the first one fast."""

    def enqueue(bound: TorchBound) -> None:
        names = call_arguments(bound.graph.spec, lambda tensor: tensor.name)
        early = copy.copy(bound)
        if bound.graph.name == STEP:
            t = names.index("t")
            early.arguments = (*bound.arguments[:t], bound.arguments[t].clone(), *bound.arguments[t + 1 :])
        bound.graph.executor.run(bound.graph.name, partial(early.forward, bound.graph.module))

    monkeypatch.setattr(TorchBound, "run", enqueue)
    agree = []
    for scale in (2.5, 4.0):
        request: Any = ([0, 1], SCHEDULE, Guidance(scale), Sampling(), 0)
        agree.append(equal(pipeline(*request), reference(*request)))
    assert agree == [True, False]


def test_swapped_guidance_branches_fail_the_gate(
    pipeline: FlexVARPipeline, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = TorchGraph.bind

    def swapped(graph: TorchGraph, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> TorchBound:
        if graph.name == STEP:
            inputs = {**inputs, "cond_rows": inputs["uncond_rows"], "uncond_rows": inputs["cond_rows"]}
        return bind(graph, inputs, outputs)

    monkeypatch.setattr(TorchGraph, "bind", swapped)
    found = parity(pipeline, proof)
    assert not found["passed"]
    assert {row["graph"] for row in found["failed"]} == {STEP, PREFILL}, "logits after prefill are held too"
