"""The public pipeline on a real bundle: what a call returns, refuses and leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import flexvar_ref
from flexvar_runtime import (
    ArtifactRefused,
    BackendUnavailable,
    FlexVARPipeline,
    GenerationOutput,
    Guidance,
    InvalidInput,
    Sampling,
    ScaleStep,
)
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.backends.ort.memory import ORT
from flexvar_runtime.generation.host import HostLoop
from flexvar_runtime.memory.plan import PUBLISHED_DECODER
from flexvar_runtime.pictures.pixels import from_uint8, to_uint8

SCHEDULE = "1_2_3x4_6_8x10"
NULL = 10


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def output(pipe: FlexVARPipeline) -> GenerationOutput:
    return pipe([3, 7, NULL], SCHEDULE, seed=11, keep_decoded=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: tuple[Path, Path]) -> flexvar_ref.Tokenizer:
    return flexvar_ref.load(*tiny_checkpoint)[1]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth, so that no token is chosen by a rounding."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 16
    waves = [np.sin(x * rng.uniform(1, 4) + y * rng.uniform(1, 4) + rng.uniform(0, 6)) for _ in range(3)]
    return np.stack([(wave * 120 + 128).astype(np.uint8) for wave in waves], axis=-1)


def equal(one: GenerationOutput, other: GenerationOutput) -> bool:
    same = all(np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    return same and np.array_equal(one.images, other.images)


# A call --------------------------------------------------------------------------------------------------------------


def test_what_a_call_returns(output: GenerationOutput, pipe: FlexVARPipeline) -> None:
    assert output.images.shape == (3, 32, 40, 3) and output.images.dtype == np.uint8
    assert [tokens.shape for tokens in output.tokens] == [(3, 1, 1), (3, 2, 2), (3, 3, 4), (3, 6, 6), (3, 8, 10)]
    assert all(tokens.dtype == np.int32 and 0 <= tokens.min() <= tokens.max() < 512 for tokens in output.tokens)
    assert output.seed == 11
    assert output.decoded is not None
    assert output.decoded.shape == (3, 3, 32, 40) and output.decoded.dtype == np.float32
    np.testing.assert_array_equal(to_uint8(output.decoded), output.images)
    assert [image.size for image in output.to_pil()] == [(40, 32)] * 3
    assert [(s.label, s.index, s.seed, s.backend) for s in output.settings] == [
        (3, 0, 11, "ort-cpu"),
        (7, 1, 11, "ort-cpu"),
        (NULL, 2, 11, "ort-cpu"),
    ]
    assert {s.bundle for s in output.settings} == {pipe.bundle.sha256}
    assert {str(s.schedule) for s in output.settings} == {SCHEDULE}


def test_the_decoded_image_is_kept_on_demand_only(pipe: FlexVARPipeline) -> None:
    assert pipe([1], "1_2", seed=0).decoded is None


def test_none_is_the_bundles_default(pipe: FlexVARPipeline) -> None:
    assert str(pipe.schedule) == "1_2_3_4_5_6_8_10_13_16"
    assert pipe.guidance == Guidance(2.5, "ramp", 16) and pipe.sampling == Sampling(900, 0.95, "upstream", 16)
    explicit = pipe([1], pipe.schedule, pipe.guidance, pipe.sampling, 5, 0)
    assert equal(pipe([1], seed=5), explicit)
    assert explicit.settings[0] == pipe([1], seed=5).settings[0]
    assert explicit.images.shape == (1, 64, 64, 3)


def test_a_fresh_seed_is_returned_and_makes_the_image_again(pipe: FlexVARPipeline) -> None:
    first, second = pipe([1], SCHEDULE), pipe([1], SCHEDULE)
    assert first.seed != second.seed and 0 <= first.seed < 2**64
    assert equal(pipe([1], SCHEDULE, seed=first.seed), first) and not equal(first, second)


@pytest.mark.parametrize("labels", [(3, 7), np.array([3, 7]), np.array([3, 7], np.uint8), [np.int64(3), 7]])
def test_labels_as_any_sequence(pipe: FlexVARPipeline, labels: Any) -> None:
    settings = pipe(labels, "1_2", seed=0).settings
    assert [s.label for s in settings] == [3, 7] and all(type(s.label) is int for s in settings)


def test_options_reach_the_tokens(pipe: FlexVARPipeline, output: GenerationOutput) -> None:
    """Each option alone changes the result: none is dropped on the way."""
    base = {"schedule": SCHEDULE, "seed": 11}
    for change in (
        {"seed": 12},
        {"first_index": 1},
        {"guidance": Guidance(5.0)},
        {"guidance": Guidance(2.5, "constant")},
        {"guidance": Guidance(2.5, "ramp", 2)},
        {"sampling": Sampling(top_k=2)},
        {"sampling": Sampling(top_p=0.1)},
        {"sampling": Sampling(greedy_scales="6")},
    ):
        other = pipe([3, 7, NULL], **{**base, **change})  # type: ignore[arg-type]
        assert any((a != b).any() for a, b in zip(other.tokens, output.tokens, strict=True)), change
    assert equal(pipe([3, 7, NULL], **base), output)  # type: ignore[arg-type]


def test_top_k_1_needs_no_seed(pipe: FlexVARPipeline) -> None:
    greedy = Sampling(top_k=1, top_p=0)
    assert equal(pipe([4], SCHEDULE, sampling=greedy, seed=1), pipe([4], SCHEDULE, sampling=greedy, seed=2))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        *[({"labels": labels}, "class") for labels in ([], [11], [-1], [1, 2.0], [True], ["7"], [None], [[1, 2]])],
        *[({"labels": [label]}, "class") for label in (float("nan"), 2**70)],
        *[({"schedule": schedule}, "schedule") for schedule in ("2_3", [])],
        *[({"seed": seed}, "seed") for seed in (-1, 2**64, 1.5, True, "1")],
        *[({"first_index": index}, "index") for index in (-1, 2**64, 0.0)],
        ({"first_index": 2**64 - 1, "labels": [1, 2]}, "index"),
        *[({"guidance": guidance}, "guidance") for guidance in ("ramp", -1, float("nan"), True, {"scale": 2})],
        ({"sampling": {"top_k": 1}}, "sampling"),
        # one entry for each image
        *[
            ({"labels": [1, 2], "seed": seeds}, "seed")
            for seeds in ([1], [1, 2, 3], [1, -1], [1, 0.5], [], [[1, 2], [3]])
        ],
        ({"labels": [1, 2], "seed": [1, 2], "first_index": 3}, "first_index"),
        *[({"labels": [1, 2], "first_index": index}, "index") for index in ([0], [0, -1], [1, 2, 3])],
        *[({"labels": [1, 2], "guidance": weights}, "guidance") for weights in ([1.0], [1.0, "x"], [1, 2, 3])],
        ({"labels": [1, 2], "guidance": [Guidance(2.0), Guidance(2.0, "constant")]}, "guidance"),
        ({"labels": [1, 2], "guidance": [Guidance(2.0, "ramp", 8), 2.0]}, "max_side"),
    ],
)
def test_refusals(pipe: FlexVARPipeline, arguments: dict[str, Any], named: str) -> None:
    request: dict[str, Any] = {"labels": [1], **arguments}
    for call in (pipe, pipe.iter_scales):  # at once, not when the first scale is asked for
        with pytest.raises(InvalidInput) as refusal:
            call(**request)
        assert named in refusal.value.got and refusal.value.exit_code == 2


def test_check_refuses_what_a_call_would(pipe: FlexVARPipeline) -> None:
    pipe.check([1, NULL], 2**64 - 1, 2**64 - 2)
    with pytest.raises(InvalidInput, match="11"):
        pipe.check([1, 11])


def test_the_bundle_is_checked_and_the_backend_never_replaced(tiny_bundle: Path, bundle_copy: Path) -> None:
    with pytest.raises(BackendUnavailable, match="tensorrt"):
        FlexVARPipeline.from_bundle(tiny_bundle, backend="tensorrt")
    with pytest.raises(InvalidInput, match="threads"):
        FlexVARPipeline.from_bundle(tiny_bundle, threads=0)
    with (bundle_copy / "step.onnx.data").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(ArtifactRefused, match=r"step\.onnx\.data"):
        FlexVARPipeline.from_bundle(bundle_copy)


def test_nan_in_the_logits_is_no_image(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is at fault, not the request: exit code 5, not 2."""
    logits = HostLoop.logits

    def spoilt(self: HostLoop, index: int, previous: Any) -> Any:
        found = logits(self, index, previous)
        return np.full_like(found, np.nan) if index == 2 else found

    monkeypatch.setattr(HostLoop, "logits", spoilt)
    with pytest.raises(ArtifactRefused, match=r"Scale 3 \(3x3\)"):
        pipe([1], schedule="1_2_3", seed=0)


def test_nan_from_the_decoder_is_no_image(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow in half precision must not end as a black image."""
    bad = np.zeros((1, 3, 4, 4), np.float32)
    bad[0, 1, 2, 3] = np.nan
    monkeypatch.setattr(pipe.generator, "decode", lambda tokens: iter([bad]))
    with pytest.raises(ArtifactRefused, match="decoder"):
        pipe([1], "1")


def test_timings(output: GenerationOutput) -> None:
    timings = output.timings
    assert [scale.size for scale in timings.scales] == [(1, 1), (2, 2), (3, 4), (6, 6), (8, 10)]
    parts = [timings.condition, timings.decode, *(part for s in timings.scales for part in (s.step, s.sample))]
    assert all(part > 0 for part in parts) and sum(parts) <= timings.total
    assert timings.sampling == sum(scale.sample for scale in timings.scales) > 0


def test_time_spent_by_the_caller_is_not_the_models(pipe: FlexVARPipeline) -> None:
    def decode_it(step: ScaleStep) -> None:
        for _ in range(5):
            step.preview()

    timings = pipe([1], "1_2_4", seed=0, on_scale=decode_it).timings
    inside = timings.condition + timings.decode + sum(scale.step + scale.sample for scale in timings.scales)
    assert inside < timings.total


# Scale by scale ------------------------------------------------------------------------------------------------------


def test_every_scale_as_it_comes(pipe: FlexVARPipeline, output: GenerationOutput) -> None:
    seen: list[ScaleStep] = []
    called = pipe([3, 7, NULL], SCHEDULE, seed=11, on_scale=seen.append)
    assert equal(called, output)
    for steps in (seen, list(pipe.iter_scales([3, 7, NULL], SCHEDULE, seed=11))):
        assert [(step.index, step.count) for step in steps] == [(i, 5) for i in range(5)]
        for step, tokens in zip(steps, output.tokens, strict=True):
            np.testing.assert_array_equal(step.tokens, tokens)
            h, w = step.size
            preview = step.preview()
            assert preview.shape == (3, 4 * h, 4 * w, 3) and preview.dtype == np.uint8
            np.testing.assert_array_equal(preview, pipe.decode(tokens))
        np.testing.assert_array_equal(steps[-1].preview(), output.images)


def test_stopping_half_way_leaves_the_pipeline_as_it_was(pipe: FlexVARPipeline, output: GenerationOutput) -> None:
    for step in pipe.iter_scales([5, 6, 1], SCHEDULE, seed=1):
        if step.index == 3:
            break
    assert equal(pipe([3, 7, NULL], SCHEDULE, seed=11, keep_decoded=True), output)


def test_an_exception_in_on_scale_leaves_the_pipeline_as_it_was(
    pipe: FlexVARPipeline, output: GenerationOutput
) -> None:
    def cancel(step: ScaleStep) -> None:
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe([5, 6, 1], SCHEDULE, seed=1, on_scale=cancel)
    assert equal(pipe([3, 7, NULL], SCHEDULE, seed=11), output)


def test_two_generations_taking_turns(pipe: FlexVARPipeline, output: GenerationOutput) -> None:
    other = pipe([5, 6, 1], SCHEDULE, seed=1)
    turns = zip(
        pipe.iter_scales([3, 7, NULL], SCHEDULE, seed=11), pipe.iter_scales([5, 6, 1], SCHEDULE, seed=1), strict=True
    )
    for i, (one, two) in enumerate(turns):
        np.testing.assert_array_equal(one.tokens, output.tokens[i])
        np.testing.assert_array_equal(two.tokens, other.tokens[i])


def test_two_pipelines_in_two_threads(tiny_bundle: Path, output: GenerationOutput) -> None:
    barrier = threading.Barrier(2, timeout=60)
    results: dict[int, list[GenerationOutput]] = {}

    def work(number: int) -> None:
        with FlexVARPipeline.from_bundle(tiny_bundle, threads=1) as pipeline:
            barrier.wait()
            results[number] = [pipeline([3, 7, NULL], SCHEDULE, seed=11) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [len(results.get(number, [])) for number in (0, 1)] == [4, 4]
    assert all(equal(result, output) for found in results.values() for result in found)


def test_a_pipeline_that_is_closed(tiny_bundle: Path) -> None:
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        steps = pipeline.iter_scales([1], SCHEDULE)
        next(steps)
    with pytest.raises(InvalidInput, match="closed"):
        next(steps)
    with pytest.raises(InvalidInput, match="closed"):
        pipeline([1], SCHEDULE)


def test_warmup_changes_nothing(tiny_bundle: Path, output: GenerationOutput) -> None:
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        pipeline.warmup(SCHEDULE, batch_sizes=(1, 3))
        assert set(pipeline.generator._graphs) == {"step", "decode"}
        assert equal(pipeline([3, 7, NULL], SCHEDULE, seed=11), output)
        for batch in (0, 1.5, True):
            with pytest.raises(InvalidInput, match="batch size"):
                pipeline.warmup("1", batch_sizes=(batch,))


# Images in and out ---------------------------------------------------------------------------------------------------


def test_decode_equals_the_reference(
    pipe: FlexVARPipeline, output: GenerationOutput, tokenizer: flexvar_ref.Tokenizer
) -> None:
    for tokens in (output.tokens[-1], np.arange(240).reshape(1, 12, 20)):
        [decoded] = [part.copy() for part in pipe.generator.decode(tokens.astype(np.int32))]
        with torch.inference_mode():
            expected = tokenizer.decode(torch.from_numpy(tokens)).numpy()
        np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-4)  # PSNR 80 dB, worst pixel
        np.testing.assert_array_equal(pipe.decode(tokens), to_uint8(decoded))


def test_encode_equals_the_reference(pipe: FlexVARPipeline, tokenizer: flexvar_ref.Tokenizer) -> None:
    images = np.stack([picture(32, 48, seed) for seed in range(3)])
    with torch.inference_mode():
        latent = tokenizer.encode(torch.from_numpy(from_uint8(images)))
        np.testing.assert_allclose(pipe.generator.encode(from_uint8(images)), latent.numpy(), rtol=0, atol=1e-4)
        expected = [tokens.numpy() for tokens in tokenizer.quantize(latent, [(8, 12), (4, 5), (16, 24)])]
    for tokens, size in zip(expected, (None, (4, 5), (16, 24)), strict=True):
        np.testing.assert_array_equal(pipe.encode(images, size), tokens)
        np.testing.assert_array_equal(pipe.encode(Image.fromarray(images[1]), size), tokens[1:2])


def test_encode_and_decode_keep_the_size(pipe: FlexVARPipeline) -> None:
    image = picture(24, 40)
    tokens = pipe.encode(image)
    assert tokens.shape == (1, 6, 10) and tokens.dtype == np.int32
    assert pipe.decode(tokens).shape == (1, 24, 40, 3)
    grey = Image.fromarray(image).convert("LA")
    np.testing.assert_array_equal(pipe.encode(grey), pipe.encode(np.asarray(grey.convert("RGB"))))


@pytest.mark.parametrize(
    "image",
    [
        *[np.zeros(shape, np.uint8) for shape in ((24, 42, 3), (0, 40, 3), (0, 8, 8, 3), (8, 8, 4), (8, 8), (3, 8, 8))],
        np.zeros((8, 8, 3), np.float32),
        Image.new("RGB", (9, 8)),
        "image.png",
    ],
)
def test_images_that_cannot_be_encoded(pipe: FlexVARPipeline, image: Any) -> None:
    with pytest.raises(InvalidInput, match="image"):
        pipe.encode(image)


@pytest.mark.parametrize("size", [(0, 4), (4, 129), (2.5, 3), ("4", "4"), (4,), (1, 2, 3)])
def test_sizes_that_cannot_be_encoded(pipe: FlexVARPipeline, size: Any) -> None:
    with pytest.raises(InvalidInput, match="schedule"):
        pipe.encode(picture(8, 8), size)


@pytest.mark.parametrize(
    "tokens",
    [
        np.zeros((4, 4), int),
        np.zeros((0, 4, 4), int),
        np.zeros((1, 0, 4), int),
        np.zeros((1, 4, 129), int),
        np.zeros((1, 4, 4)),
        np.full((1, 4, 4), 512),
        np.full((1, 4, 4), -1),
        np.full((1, 4, 4), 2**32),
        np.ones((1, 4, 4), bool),
        [[["1"]]],
        5,
    ],
)
def test_tokens_that_cannot_be_decoded(pipe: FlexVARPipeline, tokens: Any) -> None:
    with pytest.raises(InvalidInput, match="tokens"):
        pipe.decode(tokens)


@pytest.mark.parametrize("kind", [np.uint16, np.int64, list])
def test_tokens_of_any_whole_type(pipe: FlexVARPipeline, output: GenerationOutput, kind: Any) -> None:
    tokens: Any = output.tokens[2]
    tokens = tokens.tolist() if kind is list else tokens.astype(kind)
    np.testing.assert_array_equal(pipe.decode(tokens), pipe.decode(output.tokens[2]))


def test_pixels_do_not_depend_on_the_decoders_batch(
    pipe: FlexVARPipeline, output: GenerationOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    little = 3 * ORT.image(pipe.bundle.manifest, (8, 10), PUBLISHED_DECODER)
    monkeypatch.setattr(OrtCpu, "available_bytes", lambda self: little)
    np.testing.assert_array_equal(pipe.decode(output.tokens[-1]), output.images)


def test_a_schedule_of_one_scale(pipe: FlexVARPipeline) -> None:
    assert pipe([1], "1", seed=0).images.shape == (1, 4, 4, 3)
