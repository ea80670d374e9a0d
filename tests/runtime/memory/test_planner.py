"""The memory plan: exact for declared tensors, monotone, and its errors name a batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_runtime import FlexVARPipeline, Guidance, OutOfMemory, ScaleSchedule
from flexvar_runtime.backends import libraries
from flexvar_runtime.backends.ort.memory import ORT
from flexvar_runtime.bundle.manifest import FileRecord, Manifest
from flexvar_runtime.generation.host import HostLoop
from flexvar_runtime.memory import plan as memory_plan
from flexvar_runtime.memory.plan import (
    IMAGES_PER_RUN,
    MAX_BATCH,
    PUBLISHED_DECODER,
    MemoryPlan,
    batch_that_fits,
    largest_batch,
    require_fits,
    size_text,
    tensor_bytes,
)
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import STEP, graph_specs
from flexvar_runtime.request import Request

MIB, GIB = 2**20, 2**30
TEN = ScaleSchedule.parse("1_2_3_4_5_6_8_10_13_16")
D16 = ModelFacts.published(16)


def plan(
    manifest: Manifest, schedule: ScaleSchedule, images: int, guided: bool, backend: str = "ort-cpu", **options: Any
) -> MemoryPlan:
    of_backend = libraries(backend, manifest.precision)
    return memory_plan.plan(manifest, schedule, images, guided, of_backend, **options)


def image_bytes(manifest: Manifest, size: tuple[int, int]) -> int:
    return ORT.image(manifest, size, PUBLISHED_DECODER)


def published(manifest: Manifest, precision: str = "fp32") -> Manifest:
    """FlexVAR-d16, with files of its size."""
    sizes = {"condition": 415, "step": 842, "decode": 171, "encode": 117}
    half = precision != "fp32"
    files = {f"{graph}.onnx.data": size * MIB >> half for graph, size in sizes.items()}
    files |= {f"{graph}.onnx": MIB for graph in sizes} | {"tables.npz": 5 * MIB, "proof.npz": 10 * MIB}
    return replace(
        manifest,
        precision=precision,
        model=D16,
        graphs=graph_specs(D16, precision),
        largest_activation={},
        files={name: FileRecord(size=size, sha256="0" * 64) for name, size in files.items()},
    )


@pytest.fixture
def d16(manifest: Manifest) -> Manifest:
    return published(manifest)


# Exact ---------------------------------------------------------------------------------------------------------------


def test_keys_and_values_by_hand(d16: Manifest) -> None:
    """d16 at 256 px: 2 · 680 tokens · 16 blocks · 1024 · 2 branches · 4 bytes."""
    assert plan(d16, TEN, 1, True).kv == 2 * 680 * 16 * 1024 * 2 * 4
    assert plan(d16, TEN, 8, False).kv == 4 * plan(d16, TEN, 1, True).kv
    assert plan(published(d16, "fp16"), TEN, 3, True).kv * 2 == plan(d16, TEN, 3, True).kv


def test_bindings_by_hand(d16: Manifest) -> None:
    """Inputs of 256 new tokens, modulation of every block, logits: of one image with guidance."""
    inputs = 2 * 256 * (32 + 1024) + 2 * 16 * 6 * 1024 + 2 * 2 * 1024 + 3
    assert plan(d16, TEN, 1, True).bindings == (inputs + 256 * 8912) * 4


def test_axes_that_are_multiples_of_others() -> None:
    decode = graph_specs(D16, "bf16")["decode"]
    assert tensor_bytes(decode, {"images": 2, "height": 3, "width": 5}) == {
        "tokens": 2 * 3 * 5 * 4,
        "image": 2 * 3 * 48 * 80 * 4,
    }


@pytest.mark.parametrize(
    ("precision", "schedule", "images", "guided"),
    [
        ("fp32", "1_2_3_4_5_6_8_10_13_16", 2, True),
        ("fp32", "1_5_2", 1, False),
        ("fp16", "1_2_3x5_12x20", 3, True),
        ("fp16", "1_2_3x5_12x20", 3, False),
    ],
)
def test_exactly_what_is_allocated_and_bound(
    tiny_bundles: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    schedule: str,
    images: int,
    guided: bool,
) -> None:
    """The arrays of a real generation, counted."""
    scales = ScaleSchedule.parse(schedule)
    bound: list[dict[str, Any]] = []
    with FlexVARPipeline.from_bundle(tiny_bundles(precision), backend="ort-cpu") as pipe:
        planned = plan(pipe.bundle.manifest, scales, images, guided)
        with pipe.generator.loop(Request.of([0] * images, scales, Guidance(2.5 if guided else 0))) as loop:
            assert isinstance(loop, HostLoop)
            graph, buffers = loop._step, loop.tensors
            run = graph.run

            def recorded(inputs: Any, outputs: Any) -> None:
                bound.append({**inputs, **outputs})
                run(inputs, outputs)

            monkeypatch.setattr(graph, "run", recorded)
            tokens = None
            for i, (h, w) in enumerate(scales):
                loop.logits(i, tokens)
                tokens = np.zeros((images, h, w), np.int32)
            assert planned.kv == buffers.cache.nbytes
            largest = max(bound, key=lambda arrays: arrays["logits"].nbytes)
            rest = [array.nbytes for name, array in largest.items() if not name.startswith(("past_", "new_"))]
            assert planned.bindings == sum(rest)
            assert buffers.logits.nbytes == largest["logits"].nbytes
            assert planned.tables >= sum(offset.nbytes for offset in loop._offsets)


# Derived --------------------------------------------------------------------------------------------------------------


def test_phases(d16: Manifest) -> None:
    """The condition's weights are freed before the loop. The decoder adds to the loop."""
    p = plan(d16, TEN, 1, True)
    loop = p.runtime + p.tables + p.weights[STEP] + p.kv + p.bindings + p.scratch[STEP]
    decode = loop + p.weights["decode"] + p.pixels + p.scratch["decode"]
    condition = p.weights["condition"] + p.scratch["condition"]
    assert p.phases == {
        "condition": p.runtime + condition,
        "loop": loop,
        "decode": decode,
        "next": decode + p.again + condition,
    }
    assert p.total == decode == p.runtime + sum(p.parts().values())
    assert 1.4e9 < p.total < 1.9e9 and p.weights[STEP] == 843 * MIB


def test_openvino_keeps_the_condition(d16: Manifest) -> None:
    """Its weights stay until the end, and are among the parts that a refusal names."""
    p = plan(d16, TEN, 1, True, backend="openvino")
    condition = p.weights["condition"]
    assert p.phases["condition"] == p.runtime + condition + p.scratch["condition"]
    assert p.total == p.phases["decode"] == p.runtime + sum(p.parts().values())
    assert p.total - replace(p, kept=frozenset()).total == condition
    assert p.needed({"condition"}) == p.needed() - condition
    assert p.phases["next"] == p.total + p.again + p.scratch["condition"]
    assert p.total > plan(d16, TEN, 1, True).total


def test_one_phase_can_be_higher_than_the_last(d16: Manifest) -> None:
    p = plan(d16, ScaleSchedule.parse("1"), 1, False)
    huge = replace(p, weights={**p.weights, "condition": 100 * GIB})
    assert huge.total == p.runtime + 100 * GIB + p.scratch["condition"]


def test_what_is_open_is_not_needed_again(d16: Manifest) -> None:
    p = plan(d16, TEN, 1, True)
    assert p.needed() == p.total - p.runtime
    assert p.needed({"step"}) == p.needed() - p.weights["step"]
    assert p.needed({"step", "decode"}) == p.needed() - p.weights["step"] - p.weights["decode"]


def test_a_backend_that_knows_better(d16: Manifest) -> None:
    p = plan(d16, TEN, 1, True)
    known = replace(p, scratch={**p.scratch, STEP: 5 * MIB}, runtime=0)
    assert p.total - known.total == p.runtime + p.scratch[STEP] - 5 * MIB


def test_it_grows_with_every_part_of_a_request(d16: Manifest) -> None:
    totals = [plan(d16, TEN, images, True).total for images in range(1, 40)]
    assert totals == sorted(set(totals))
    assert plan(d16, TEN, 4, False).total < plan(d16, TEN, 4, True).total
    larger = [plan(d16, ScaleSchedule.parse(s), 1, True).total for s in ("1", "1_4", "1_4_16", "1_4_8_16", "512px")]
    assert larger == sorted(set(larger))


def test_half_precision_is_widened_on_a_cpu(manifest: Manifest) -> None:
    half, full = plan(published(manifest, "fp16"), TEN, 1, True), plan(published(manifest), TEN, 1, True)
    assert half.weights[STEP] == pytest.approx(full.weights[STEP], rel=0.01)
    assert half.weights["decode"] > full.weights["decode"] and half.scratch["decode"] > full.scratch["decode"]


def test_the_decoder_runs_in_parts(d16: Manifest) -> None:
    """More runs take no more memory than their pixels, except the second run of a shape."""
    for images, at_once, again in ((8, 8, False), (12, 8, False), (16, 8, True), (2, 1, True), (1, 1, False)):
        p = plan(d16, TEN, images, True, decoded_at_once=at_once)
        assert p.scratch["decode"] == at_once * image_bytes(d16, (16, 16))
        assert p.parts()["working memory"] == p.scratch[STEP] + p.scratch["decode"] * (2 if again else 1)
    assert plan(d16, TEN, 99, True).decoded_at_once == IMAGES_PER_RUN


def test_a_smaller_decoder(d16: Manifest) -> None:
    assert image_bytes(d16, (16, 16)) == image_bytes(d16, (8, 32)) == int(256 * 256 * 4 * 6.4 * 128)
    small = plan(d16, TEN, 1, True, decoder_channels=(32, 64))
    assert small.scratch["decode"] == int(256 * 256 * 4 * 4.3 * 64)
    phases = plan(replace(d16, decoder="phases"), TEN, 1, True, decoder_channels=(32, 64))
    assert phases.scratch["decode"] == int(256 * 256 * 4 * 5.3 * 64)  # where the phases are joined
    assert image_bytes(replace(d16, decoder="phases"), (16, 16)) == image_bytes(d16, (16, 16))


def test_json(d16: Manifest) -> None:
    p = plan(d16, TEN, 2, True)
    data = p.to_json()
    assert data["total"] == p.total and data["bytes"]["kv"] == p.kv and data["schedule"] == str(TEN)


# What fits -----------------------------------------------------------------------------------------------------------


def test_the_largest_batch_that_fits() -> None:
    for available, fits in ((9, 0), (10, 1), (29, 2), (30, 3), (12345, 1234), (2**60, MAX_BATCH - 1)):
        assert largest_batch(lambda n: 10 * n, available) == fits


@pytest.mark.parametrize("opened", [(), ("step",), ("step", "decode")])
def test_the_refusal_is_true(d16: Manifest, opened: tuple[str, ...]) -> None:
    """The batch that it names fits, one image more does not."""
    for fits in (1, 2, 5, 40):
        available = plan(d16, TEN, fits, True).needed(opened)
        for left in (available, available + 1):
            with pytest.raises(OutOfMemory) as refusal:
                require_fits(lambda n: plan(d16, TEN, n, True), 64, left, opened)
            assert f"at most {fits}." in refusal.value.fix and refusal.value.exit_code == 6
            require_fits(lambda n: plan(d16, TEN, n, True), fits, left, opened)
            with pytest.raises(OutOfMemory):
                require_fits(lambda n: plan(d16, TEN, n, True), fits + 1, left, opened)


def test_a_refusal_names_the_parts(d16: Manifest) -> None:
    p = plan(d16, TEN, 8, True)
    with pytest.raises(OutOfMemory) as refusal:
        require_fits(lambda n: plan(d16, TEN, n, True), 8, 3 * GIB)
    parts = p.parts()
    for named in (str(TEN), size_text(p.needed()), *(f"{part} {size_text(size)}" for part, size in parts.items())):
        assert named in refusal.value.got
    assert parts["keys and values"] == 1360 * MIB and sum(parts.values()) == p.needed()
    assert refusal.value.expected == "at most 3.0 GiB"


def test_not_even_one_image(d16: Manifest) -> None:
    with pytest.raises(OutOfMemory, match=r"100\.0 MiB .*smaller schedule"):
        require_fits(lambda n: plan(d16, TEN, n, True), 1, 100 * MIB)


def test_nothing_is_refused_where_nothing_is_known(d16: Manifest) -> None:
    require_fits(lambda n: plan(d16, TEN, n, True), 10**6, None)
    assert batch_that_fits(d16, "decode", (16, 16), None, (), ORT) == IMAGES_PER_RUN


@pytest.mark.parametrize("graph", ["decode", "encode"])
def test_images_in_one_run(d16: Manifest, graph: str) -> None:
    """They take half of the memory that the weights leave: at least one image, at most eight."""
    one = image_bytes(d16, (16, 16))
    for left, batch in ((one, 1), (2 * one, 1), (6 * one, 3), (7 * one, 3), (100 * one, IMAGES_PER_RUN)):
        assert batch_that_fits(d16, graph, (16, 16), left, {graph}, ORT) == batch
    with pytest.raises(OutOfMemory, match=f"{graph[:-1].title()}ing .*16x16"):
        batch_that_fits(d16, graph, (16, 16), one, (), ORT)  # the weights must be loaded first
    assert batch_that_fits(d16, graph, (16, 16), one + 250 * MIB, (), ORT) == 1


def test_sizes_as_text() -> None:
    assert [size_text(n) for n in (0, 3 * MIB, GIB, 3 * GIB // 2)] == ["0.0 MiB", "3.0 MiB", "1.0 GiB", "1.5 GiB"]
