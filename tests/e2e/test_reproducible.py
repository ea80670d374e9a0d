"""The same bundle, seed and index give the same tokens: alone, in any batch, with any threads, in another process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_runtime import FlexVARPipeline, GenerationOutput, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.model.noise import draws
from flexvar_runtime.model.sampling import sample
from flexvar_runtime.request import Request

FLEXVAR = Path(sys.executable).with_name("flexvar")
SCHEDULE = "1_2_3_4_5_6_8_10_13_16"
LABELS = [0, 3, 10, 3, 7, 1, 9, 3]  # some twice
LOOSE: dict[str, Any] = {"guidance": Guidance(0), "sampling": Sampling(top_k=0, top_p=0)}  # tokens depend on every draw
GUIDANCE = {"guided": Guidance(2.5), "unguided": Guidance(0)}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, threads=2) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def batch(pipe: FlexVARPipeline) -> GenerationOutput:
    return pipe(LABELS, SCHEDULE, seed=2**63, first_index=40)


def tokens_BL(output: GenerationOutput) -> NDArray[np.int32]:
    return np.concatenate([tokens.reshape(len(tokens), -1) for tokens in output.tokens], axis=1)


def logits_of(
    pipe: FlexVARPipeline, labels: Sequence[int], indices: Sequence[int], schedule: str, guidance: Guidance
) -> list[NDArray[np.float32]]:
    """Guided logits (B, h·w, V) of every scale of a generation."""
    scales, found, tokens = ScaleSchedule.parse(schedule), [], None
    with pipe.generator.loop(Request.of(labels, scales, guidance)) as loop:
        for i, (h, w) in enumerate(scales):
            logits = loop.logits(i, tokens)
            found.append(logits.copy())
            noise = np.concatenate([draws(7, index, i, h * w) for index in indices])
            rows = logits.reshape(len(labels) * h * w, -1)
            tokens = sample(rows, noise, top_k=Sampling().top_k_at(h, w), top_p=0.95).reshape(len(labels), h, w)
    return found


# Batch and position --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(8))
def test_alone_as_in_a_batch(pipe: FlexVARPipeline, batch: GenerationOutput, position: int) -> None:
    alone = pipe([LABELS[position]], SCHEDULE, seed=2**63, first_index=40 + position)
    np.testing.assert_array_equal(tokens_BL(alone)[0], tokens_BL(batch)[position])
    np.testing.assert_array_equal(alone.images[0], batch.images[position])
    assert alone.settings[0] == batch.settings[position]


@pytest.mark.parametrize(("start", "end"), [(0, 3), (3, 8), (1, 7)])
def test_in_batches_of_other_sizes(pipe: FlexVARPipeline, batch: GenerationOutput, start: int, end: int) -> None:
    part = pipe(LABELS[start:end], SCHEDULE, seed=2**63, first_index=40 + start)
    np.testing.assert_array_equal(tokens_BL(part), tokens_BL(batch)[start:end])
    np.testing.assert_array_equal(part.images, batch.images[start:end])


def test_in_any_position(pipe: FlexVARPipeline) -> None:
    """One image at every place of a batch of different images."""
    alone = tokens_BL(pipe([7], "1_2_4_8", **LOOSE, seed=5, first_index=100))[0]
    for position in range(8):
        labels = [*range(position), 7, *range(7 - position)]
        together = pipe(labels, "1_2_4_8", **LOOSE, seed=5, first_index=100 - position)
        np.testing.assert_array_equal(tokens_BL(together)[position], alone)


def test_images_of_a_batch_differ(batch: GenerationOutput) -> None:
    """Negative control: the same class with another index gives another image."""
    twins = tokens_BL(batch)[[i for i, label in enumerate(LABELS) if label == 3]]
    assert len(np.unique(twins, axis=0)) == 3


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("schedule", [SCHEDULE, "1_2x3_5x4_6x9_12x20"])
def test_logits_of_an_image_have_the_same_bits_in_any_batch(
    pipe: FlexVARPipeline, guidance: str, schedule: str
) -> None:
    """This is stronger than equal tokens: a different rounding changes only one draw in a million."""
    together = logits_of(pipe, LABELS, range(8), schedule, GUIDANCE[guidance])
    for start, end in ((0, 1), (5, 6), (7, 8), (2, 5)):
        alone = logits_of(pipe, LABELS[start:end], range(start, end), schedule, GUIDANCE[guidance])
        for one, many in zip(alone, together, strict=True):
            assert one.tobytes() == many[start:end].tobytes()


# Threads and processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(pipe: FlexVARPipeline, batch: GenerationOutput, tiny_bundle: Path, threads: int) -> None:
    with FlexVARPipeline.from_bundle(tiny_bundle, threads=threads) as other:
        again = other(LABELS, SCHEDULE, seed=2**63, first_index=40)
        np.testing.assert_array_equal(tokens_BL(again), tokens_BL(batch))
        np.testing.assert_array_equal(again.images, batch.images)
        both = (logits_of(p, LABELS[:2], (0, 1), SCHEDULE, Guidance()) for p in (pipe, other))
        for one, two in zip(*both, strict=True):
            assert one.tobytes() == two.tobytes()


def test_another_process(batch: GenerationOutput, tiny_bundle: Path, tmp_path: Path) -> None:
    """Other batches, other threads, images 2 to 6 only."""
    command = [
        *(str(FLEXVAR), "generate", str(tiny_bundle), "-o", str(tmp_path), "--schedule", SCHEDULE, "--threads", "1"),
        *("--classes", ",".join(map(str, LABELS[2:7])), "--seed", str(2**63), "--first-index", "42"),
        *("--batch-size", "3", "--save-arrays", str(tmp_path / "arrays.npz")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(tmp_path / "arrays.npz") as arrays:
        np.testing.assert_array_equal(arrays["tokens"], tokens_BL(batch)[2:7])


def test_a_pipeline_with_a_history(tiny_bundle: Path, batch: GenerationOutput) -> None:
    """Earlier calls, cached conditions, used buffers and decoded previews change nothing."""
    with FlexVARPipeline.from_bundle(tiny_bundle) as other:
        other([9, 3, 5], "1_2_3x4", Guidance(4, "constant"), seed=0)
        other(LABELS, SCHEDULE, seed=1, on_scale=lambda step: step.preview() if step.index == 2 else None)
        again = other(LABELS, SCHEDULE, seed=2**63, first_index=40)
    np.testing.assert_array_equal(tokens_BL(again), tokens_BL(batch))
    np.testing.assert_array_equal(again.images, batch.images)


# Seeds and indices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_64_bit_seed(pipe: FlexVARPipeline, seed: int) -> None:
    outputs = [pipe([1], "1_2_4", **LOOSE, seed=seed, first_index=index) for index in (0, 2**32, 2**64 - 1)]
    assert [output.seed for output in outputs] == [seed] * 3
    assert len({tokens_BL(output).tobytes() for output in outputs}) == 3


def test_seeds_that_differ_in_one_bit(pipe: FlexVARPipeline) -> None:
    found = {
        tokens_BL(pipe([1], "1_2_4", **LOOSE, seed=seed)).tobytes() for seed in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)
    }
    assert len(found) == 6
