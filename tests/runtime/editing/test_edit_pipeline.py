"""`pipe.edit` on a real bundle: what it returns, refuses and leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from flexvar_export.bundle_writer import write_bundle
from flexvar_runtime import Bundle, FlexVARPipeline, Guidance, InvalidInput, OutOfMemory, ScaleStep
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.generation.host import HostGenerator, ScaleLoop
from flexvar_runtime.request import Shape

NULL = 10
SCHEDULE = "1_2_3x4_6x8"


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu") as pipeline:
        yield pipeline


def picture(height: int = 24, width: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width] / 8
    rng = np.random.default_rng(seed)
    waves = [np.sin(x * rng.uniform(1, 3) + y * rng.uniform(1, 3) + rng.uniform(0, 6)) for _ in range(3)]
    return np.stack([(wave * 120 + 128).astype(np.uint8) for wave in waves], axis=-1)


def hole(height: int = 24, width: int = 32) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), bool)
    mask[8:, 16:] = True
    return mask


def edit(pipe: FlexVARPipeline, task: str = "inpaint", **options: Any) -> Any:
    if task == "inpaint":
        options = {"mask": hole(), **options}
    return pipe.edit(picture(), task, **{"schedule": SCHEDULE, "size": (24, 32), "seed": 5, **options})


def test_an_edit_returns_pixels_tokens_and_its_settings(pipe: FlexVARPipeline) -> None:
    result = edit(pipe, labels=[3])
    assert result.images.shape == (1, 24, 32, 3) and result.images.dtype == np.uint8
    assert [tokens.shape[1:] for tokens in result.tokens] == [(1, 1), (2, 2), (3, 4), (6, 8)]
    (settings,) = result.settings
    assert settings.edit.edit.task == "inpaint" and settings.label == 3 and settings.seed == 5
    assert len(result.timings.scales) == 4 and result.timings.total > 0
    again = edit(pipe, labels=[3])
    assert np.array_equal(again.images, result.images) and again.settings == result.settings
    assert not np.array_equal(edit(pipe, labels=[4]).images, result.images)


def test_kept_tokens_are_the_pictures_own(pipe: FlexVARPipeline) -> None:
    result = edit(pipe, labels=[3])
    own = pipe.encode(picture())
    kept = ~hole()[::4, ::4]
    assert np.array_equal(result.tokens[-1][0][kept], own[0][kept])
    pasted = edit(pipe, labels=[3], paste=True)
    assert np.array_equal(pasted.images[0][~hole()], picture()[~hole()])
    assert np.array_equal(pasted.images[0][hole()], result.images[0][hole()])


def test_one_picture_in_many_ways_and_many_pictures_at_once(pipe: FlexVARPipeline) -> None:
    """Whatever else is in the batch, an image is the same alone."""
    ways = edit(pipe, labels=[3, 4])
    alone = edit(pipe, labels=[4], first_index=1)
    assert np.array_equal(ways.images[1], alone.images[0])
    pictures = [picture(seed=1), picture(seed=2)]
    options: dict[str, Any] = {"schedule": SCHEDULE, "size": (24, 32), "seed": 5, "labels": [1, 2]}
    both = pipe.edit(pictures, "inpaint", mask=[hole(), hole()[::-1]], **options)
    second = pipe.edit(pictures[1], "inpaint", mask=hole()[::-1], **{**options, "labels": [2]}, first_index=1)
    assert np.array_equal(both.images[1], second.images[0])
    with pytest.raises(InvalidInput, match=r"2 pictures .*3 labels"):
        pipe.edit(pictures, "inpaint", mask=hole(), **{**options, "labels": [1, 2, 3]})
    with pytest.raises(InvalidInput, match=r"2 pictures .*1 masks"):
        pipe.edit(pictures, "inpaint", mask=[hole()], **options)
    with pytest.raises(InvalidInput, match=r"pictures .*sizes"):
        pipe.edit([picture(), picture(32, 24)], "refine", labels=[1, 2])
    with pytest.raises(InvalidInput, match=r"pictures .*sizes"):  # what is left of them without padding
        pipe.edit([picture(), picture(32, 24)], "refine", labels=[1, 2], size=(32, 32), fit="pad")


def test_without_a_class_there_is_no_guidance_unless_it_is_said(pipe: FlexVARPipeline) -> None:
    off = edit(pipe)
    assert off.settings[0].label == NULL and off.settings[0].guidance.scale == 0
    said = edit(pipe, guidance=Guidance(3.0))
    assert said.settings[0].guidance.scale == 3
    assert np.array_equal(off.images, said.images)  # both branches say the same
    assert edit(pipe, labels=[1]).settings[0].guidance == pipe.guidance


@pytest.mark.parametrize(("strength", "forced"), [(None, 3), (0.0, 3), (0.25, 3), (0.5, 2), (0.75, 1), (1.0, 0)])
def test_strength_is_the_share_of_scales_generated(
    pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch, strength: float | None, forced: int
) -> None:
    seen: list[int] = []
    force = ScaleLoop.force
    monkeypatch.setattr(ScaleLoop, "force", lambda self, tokens: seen.append(len(tokens)) or force(self, tokens))
    edit(pipe, "refine", strength=strength)
    assert seen == ([forced] if forced else [])


def test_a_small_picture_forces_half_the_octaves(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    force = ScaleLoop.force
    monkeypatch.setattr(ScaleLoop, "force", lambda self, tokens: seen.append(len(tokens)) or force(self, tokens))
    pipe.edit(picture()[::3, ::3], "refine", size=(24, 32), schedule=SCHEDULE, seed=1)  # 8x10: 2x2.5 of 6x8 tokens
    pipe.edit(picture()[:1, :1], "refine", size=(24, 32), schedule=SCHEDULE, seed=1)
    assert seen == [3, 1]


def test_pictures_that_would_keep_other_scales_are_not_edited_at_once(pipe: FlexVARPipeline) -> None:
    pictures, options = [picture(), picture()[:1, :1]], {"size": (24, 32), "schedule": SCHEDULE, "seed": 1}
    with pytest.raises(InvalidInput, match=r"1 or 3 scales .*strength"):
        pipe.edit(pictures, "refine", labels=[1, 2], **options)
    both = pipe.edit(pictures, "refine", labels=[1, 2], strength=0.5, **options)
    alone = pipe.edit(pictures[1], "refine", labels=[2], strength=0.5, first_index=1, **options)
    assert np.array_equal(both.images[1], alone.images[0])


def test_a_strength_of_one_is_a_generation(pipe: FlexVARPipeline) -> None:
    edited = edit(pipe, "refine", strength=1.0, labels=[3])
    assert np.array_equal(edited.images, pipe([3], SCHEDULE, seed=5).images)


def test_sizes_and_schedules_are_derived(pipe: FlexVARPipeline) -> None:
    default = pipe.edit(picture(64, 64), "refine", seed=1)
    assert default.settings[0].schedule == pipe.schedule and default.images.shape[1:3] == (64, 64)
    wide = pipe.edit(picture(30, 120), "refine", seed=1, steps=6)
    assert wide.images.shape[1:3] == (32, 128) and len(wide.settings[0].schedule) == 6
    grown = pipe.edit(picture(64, 64), "outpaint", sides=(0, 32, 0, 32), seed=1)
    assert grown.images.shape[1:3] == (64, 128)
    with pytest.raises(InvalidInput, match=r"schedule .*1_2_4 .*6x8"):
        edit(pipe, schedule="1_2_4")
    with pytest.raises(InvalidInput, match=r"schedule .*steps"):
        edit(pipe, steps=4)


def test_a_padded_picture_comes_back_without_padding(pipe: FlexVARPipeline) -> None:
    result = pipe.edit(picture(24, 48), "refine", size=(32, 32), fit="pad", seed=1, steps=4)
    assert result.images.shape[1:3] == (16, 32)


def test_previews_are_decoded_only_when_asked(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, ...]] = []
    decode = pipe.generator.decode
    monkeypatch.setattr(pipe.generator, "decode", lambda tokens: decoded.append(tokens.shape[1:]) or decode(tokens))
    edit(pipe, on_scale=lambda step: None)
    assert decoded == [(6, 8)]
    sizes = []
    edit(pipe, on_scale=lambda step: sizes.append(step.preview().shape[1:3]))
    assert sizes == [(4, 4), (8, 8), (12, 16), (24, 32)]


class Stop(Exception):
    pass


@pytest.mark.parametrize("task", ["inpaint", "refine"])
def test_a_cancelled_edit_leaves_nothing(pipe: FlexVARPipeline, task: str) -> None:
    expected, plain = edit(pipe, task), pipe([3], SCHEDULE, seed=1)
    for last in range(4):

        def stop(step: ScaleStep, last: int = last) -> None:
            if step.index == last:
                raise Stop

        with pytest.raises(Stop):
            edit(pipe, task, on_scale=stop)
        assert np.array_equal(edit(pipe, task).images, expected.images)
        for step in pipe.iter_scales([3], SCHEDULE, seed=1):
            if step.index == last:
                break
        assert np.array_equal(pipe([3], SCHEDULE, seed=1).images, plain.images)


def test_a_failed_edit_leaves_nothing(pipe: FlexVARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = edit(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.generator, "encode", _out_of_memory)
        with pytest.raises(OutOfMemory):
            edit(pipe)
    with pytest.raises(InvalidInput, match="class is 99"):
        edit(pipe, labels=[99])
    with pytest.raises(InvalidInput, match="mask has no white"):
        edit(pipe, mask=np.zeros((24, 32), bool))
    assert np.array_equal(edit(pipe).images, expected.images)


def _out_of_memory(*_: object) -> None:
    raise OutOfMemory("all", expected="less", fix="wait")


def _peak() -> int:
    """Largest resident memory since it was last forgotten, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system has no /proc/self/clear_refs")
def test_memory_does_not_grow_over_200_edits(pipe: FlexVARPipeline) -> None:
    """What the first edits took is enough for all."""
    small: dict[str, Any] = {"schedule": "1_2_3x4", "size": (12, 16), "steps": None}
    for i in range(20):
        edit(pipe, ("inpaint", "refine")[i % 2], **small)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # what tests before this one took is forgotten
    for i in range(20):
        edit(pipe, ("inpaint", "refine")[i % 2], **small)
    before = _peak()
    for i in range(200):
        edit(pipe, ("inpaint", "refine")[i % 2], **small, labels=[i % NULL], seed=i)
    assert _peak() - before < 8 * 1024


def test_a_bundle_without_the_graph_runs_scale_by_scale(
    pipe: FlexVARPipeline, tiny_bundle: Path, tmp_path: Path, seal_proved: Callable[[Path, Manifest], Bundle]
) -> None:
    """Older bundles have no such graph. The tokens are the same."""
    manifest = Manifest.from_bytes((tiny_bundle / "manifest.json").read_bytes())
    graphs = {name: spec for name, spec in manifest.graphs.items() if name != "prefill"}
    with write_bundle(tmp_path / "old.bundle") as directory:
        for name in manifest.files:
            if not name.startswith("prefill"):
                (directory / name).write_bytes((tiny_bundle / name).read_bytes())
        seal_proved(directory, replace(manifest, graphs=graphs, files={}))
    with FlexVARPipeline.from_bundle(tmp_path / "old.bundle", "ort-cpu") as old:
        assert not old.generator.prefills and pipe.generator.prefills
        one, two = edit(old, "refine", strength=0.5), edit(pipe, "refine", strength=0.5)
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, two.tokens, strict=True))


@pytest.mark.parametrize(("room", "opened"), [(None, 1), (1, 1), (0, 0)], ids=["unknown", "enough", "none"])
def test_a_second_copy_of_the_weights_is_taken_where_there_is_room(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, opened: int
) -> None:
    """room: whether there is some for it beside the generation."""
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        expected = edit(pipe, "refine", strength=0.5)
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        generator, real, graphs = cast(HostGenerator, pipe.generator), pipe.backend.open, []

        def left() -> int | None:
            wanted = generator.memory_plan(Shape(expected.settings[0].schedule, 1, False))
            if room is None:
                return None
            return wanted.needed(generator._graphs) + wanted.weights["step"] - (not room)

        def opening(bundle: Any, graph: str, **how: bool) -> Any:
            graphs.append(graph)
            return real(bundle, graph, **how)

        monkeypatch.setattr(pipe.backend, "available_bytes", left)
        monkeypatch.setattr(pipe.backend, "open", opening)
        made = [edit(pipe, "refine", strength=0.5) for _ in range(2)]
    assert graphs.count("prefill") == opened
    for output in made:
        assert all(np.array_equal(a, b) for a, b in zip(output.tokens, expected.tokens, strict=True))
