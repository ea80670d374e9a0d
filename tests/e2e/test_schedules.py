"""One bundle runs every schedule, batch and guidance, token for token as the reference does with the same draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import flexvar_ref
from flexvar_export.proof import reference_options, shared_noise
from flexvar_ref import FlexVAR
from flexvar_runtime import FlexVARPipeline, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.model.noise import draws
from flexvar_runtime.model.sampling import sample
from flexvar_runtime.model.schedule import PUBLISHED

SEED = 2**63 + 5
NON_SQUARE = "1_2_3x5_6x10_9x15_12x20"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are tiny. Two pools of threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: tuple[Path, Path]) -> FlexVAR:
    return flexvar_ref.load(*tiny_checkpoint)[0]


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    """Opened once, because every schedule runs with the same sessions."""
    with FlexVARPipeline.from_bundle(tiny_bundle, threads=1) as pipeline:
        yield pipeline
        assert len(pipeline.generator._graphs) <= 2


def run_both(
    pipe: FlexVARPipeline,
    model: FlexVAR,
    labels: list[int],
    schedule: ScaleSchedule,
    guidance: Guidance,
    sampling: Sampling,
    first_index: int = 0,
) -> None:
    options = reference_options(guidance, sampling)
    reference = list(flexvar_ref.iter_scales(model, labels, schedule, options, shared_noise(SEED, first_index)))
    steps = list(pipe.iter_scales(labels, schedule, guidance, sampling, SEED, first_index))
    for expected, step in zip(reference, steps, strict=True):
        assert step.size == expected.size
        np.testing.assert_array_equal(step.tokens, expected.tokens.numpy())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedules(pipe: FlexVARPipeline, model: FlexVAR, name: str) -> None:
    schedule = ScaleSchedule.parse(PUBLISHED[name])
    assert schedule[-1] == ((32, 32) if name == "512px" else (16, 16))
    scale = 3.0 if name == "512px" else 2.5
    run_both(pipe, model, [3], schedule, Guidance(scale), Sampling())


@pytest.mark.parametrize("images", [1, 3, 8])
@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(4, "constant"), Guidance(0)], ids=["ramp", "constant", "off"]
)
def test_batches_of_a_non_square(pipe: FlexVARPipeline, model: FlexVAR, images: int, guidance: Guidance) -> None:
    schedule = ScaleSchedule.parse(NON_SQUARE)
    run_both(pipe, model, list(range(images)), schedule, guidance, Sampling(), first_index=2**32 - 2)


@pytest.mark.parametrize(
    ("guidance", "sampling"),
    [
        (Guidance(2.5, "ramp", 4), Sampling(max_side=4)),
        (Guidance(2.5), Sampling(top_k=0, top_p=0, greedy_scales="none")),
        (Guidance(1.5, "constant"), Sampling(top_k=5, top_p=1.0)),
        (Guidance(2.5), Sampling(top_k=1, top_p=0)),
        (Guidance(0, "constant"), Sampling(top_k=0, top_p=0.3)),
    ],
)
def test_options(pipe: FlexVARPipeline, model: FlexVAR, guidance: Guidance, sampling: Sampling) -> None:
    run_both(pipe, model, [1, 9, 10], ScaleSchedule.parse("1_2_3_5_7_8"), guidance, sampling)


def test_images_of_every_size(pipe: FlexVARPipeline) -> None:
    for schedule, size in ((NON_SQUARE, (48, 80)), ("512px", (128, 128)), ("1_20x12", (80, 48)), ("1", (4, 4))):
        assert pipe([1, 2], schedule, seed=0).images.shape == (2, *size, 3)


def uncached_logits(
    model: FlexVAR, labels: list[int], tokens: list[NDArray[np.int32]], schedule: ScaleSchedule, guidance: Guidance
) -> list[NDArray[np.float32]]:
    """Guided logits (B, h·w, V) of every scale from one pass without a cache, under the block-causal mask."""
    given_tokens = [torch.from_numpy(scale) for scale in tokens]
    null = [model.config.null_class] * len(labels)
    with torch.inference_mode():
        cond, uncond = (model(torch.tensor(rows), given_tokens, schedule) for rows in (labels, null))
    split = [[part.numpy() for part in x.split([h * w for h, w in schedule], dim=1)] for x in (cond, uncond)]
    return [(1 + t) * c - t * u for t, c, u in zip(guidance.weights(schedule), *split, strict=True)]


@pytest.mark.parametrize("schedule", [PUBLISHED["10"], NON_SQUARE])
@pytest.mark.parametrize("guidance", [Guidance(2.5), Guidance(0)], ids=["guided", "unguided"])
def test_cached_equals_uncached(pipe: FlexVARPipeline, model: FlexVAR, schedule: str, guidance: Guidance) -> None:
    parsed, labels, sampling = ScaleSchedule.parse(schedule), [2, 7], Sampling()
    steps = list(pipe.iter_scales(labels, parsed, guidance, sampling, SEED))
    logits = uncached_logits(model, labels, [step.tokens for step in steps], parsed, guidance)
    for step, uncached_BLV in zip(steps, logits, strict=True):
        h, w = step.size
        noise = np.concatenate([draws(SEED, image, step.index, h * w) for image in (0, 1)])
        rows = uncached_BLV.reshape(2 * h * w, -1)
        tokens = sample(rows, noise, top_k=sampling.top_k_at(h, w), top_p=sampling.top_p).reshape(2, h, w)
        np.testing.assert_array_equal(step.tokens, tokens)


def test_a_token_of_an_earlier_scale_matters(pipe: FlexVARPipeline, model: FlexVAR) -> None:
    """Negative control of the comparison above: other tokens change the logits of every later scale."""
    schedule = ScaleSchedule.parse("1_2_4_8")
    tokens = [step.tokens for step in pipe.iter_scales([2], schedule, seed=SEED)]
    changed = [tokens[0], (tokens[1] + 1) % 512, *tokens[2:]]
    before, after = (uncached_logits(model, [2], maps, schedule, Guidance(0)) for maps in (tokens, changed))
    assert [bool(np.abs(a - b).max() > 0.1) for a, b in zip(before, after, strict=True)] == [False, False, True, True]


side = st.integers(1, 7)
sizes = st.lists(st.tuples(side, side), max_size=5)  # in any order: a schedule may shrink


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=sizes,
    images=st.integers(1, 3),
    guidance=st.builds(Guidance, st.floats(0, 6), st.sampled_from(["ramp", "constant"]), st.integers(1, 8)),
    top_k=st.integers(0, 20),
    top_p=st.floats(0, 1),
)
def test_any_schedule(
    pipe: FlexVARPipeline,
    model: FlexVAR,
    sizes: list[tuple[int, int]],
    images: int,
    guidance: Guidance,
    top_k: int,
    top_p: float,
) -> None:
    sampling = Sampling(top_k, top_p, max_side=guidance.max_side)
    run_both(pipe, model, list(range(images)), ScaleSchedule(((1, 1), *sizes)), guidance, sampling)
