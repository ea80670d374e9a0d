"""Every task of an edit gives the same tokens in the runtime and in the reference, from the picture on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexvar_ref
from flexvar_export.proof import reference_options, shared_noise
from flexvar_ref.generation import Given
from flexvar_runtime import FlexVARPipeline, Guidance, Sampling
from flexvar_runtime.editing.canvas import make_canvas
from flexvar_runtime.editing.options import Edit
from flexvar_runtime.pictures.photo import read_photo
from flexvar_runtime.pictures.pixels import from_uint8

SAMPLING = Sampling(top_k=50, top_p=0.9, greedy_scales="none")
GUIDANCE = Guidance(3.0)
SEED = 2**63 + 5


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: tuple[Path, Path]) -> tuple[flexvar_ref.FlexVAR, flexvar_ref.Tokenizer]:
    return flexvar_ref.load(*tiny_checkpoint)


def picture() -> np.ndarray:
    y, x = np.mgrid[:40, :56] / 9
    waves = [np.sin(x * (c + 1) + y * (2 - c) + c) * np.cos(y * (c + 0.5)) for c in range(3)]
    return np.stack([(wave * 120 + 128).astype(np.uint8) for wave in waves], axis=-1)


def mask() -> np.ndarray:
    drawn = np.zeros((40, 56), np.uint8)
    drawn[11:31, 5:40] = 255
    return drawn


TASKS: dict[str, dict[str, Any]] = {
    "refine": {"size": (40, 56), "strength": 0.4},
    "inpaint": {"size": (40, 56)},
    "outpaint": {"size": (24, 32), "sides": (8, 0, 4, 16)},
    "expand": {"size": (24, 64), "anchor": "left"},
}


@pytest.mark.parametrize("label", [None, 3], ids=["no class", "a class"])
@pytest.mark.parametrize("task", TASKS)
def test_the_runtime_edits_as_the_reference_does(
    pipe: FlexVARPipeline,
    reference: tuple[flexvar_ref.FlexVAR, flexvar_ref.Tokenizer],
    task: str,
    label: int | None,
) -> None:
    model, tokenizer = reference
    options = TASKS[task]
    drawn = mask() if task == "inpaint" else None
    labels = None if label is None else [label, label]
    got = pipe.edit(
        [picture(), picture()[:, ::-1]],
        task,
        mask=None if drawn is None else [drawn, drawn],
        labels=labels,
        steps=7,
        guidance=GUIDANCE,
        sampling=SAMPLING,
        seed=SEED,
        **options,
    )
    schedule = tuple(got.settings[0].schedule)
    area = pipe.schedule[-1][0] * pipe.schedule[-1][1]
    canvases = [
        make_canvas(read_photo(one), drawn, Edit(task=task, **options), pipe.model.downsampling, area)
        for one in (picture(), picture()[:, ::-1])
    ]
    images = torch.from_numpy(from_uint8(np.stack([canvas.pixels for canvas in canvases])))
    if task == "refine":
        given: Given = flexvar_ref.refine(tokenizer, images, schedule, len(schedule) - round(0.4 * len(schedule)))
    else:
        white = np.stack([canvas.mask >= 128 for canvas in canvases if canvas.mask is not None])
        given = flexvar_ref.inpaint(tokenizer, images, torch.from_numpy(white), schedule)
    classes = labels or [model.config.null_class] * 2
    scales = list(
        flexvar_ref.iter_scales(
            model, classes, schedule, reference_options(GUIDANCE, SAMPLING), shared_noise(SEED), given=given
        )
    )
    for ours, theirs in zip(got.tokens, scales, strict=True):
        assert np.array_equal(ours, theirs.tokens.numpy())
    assert any(not keep.all() for keep in given.keep) and any(keep.any() for keep in given.keep)
    with torch.inference_mode():
        decoded = tokenizer.decode(scales[-1].tokens).numpy()
    pixels = (decoded.transpose(0, 2, 3, 1) * 127.5 + 128).clip(0, 255).astype(np.uint8)
    assert np.abs(pixels.astype(int) - got.images.astype(int)).max() <= 1
