"""The settings of an image, to JSON and back, and the other parts of an output."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flexvar_runtime import ArtifactRefused, GenerationOutput, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.output import ScaleTime, Settings, Timings

SETTINGS = Settings(
    bundle="ab" * 32,
    label=7,
    seed=2**64 - 1,
    index=2**63 + 1,
    schedule=ScaleSchedule.parse("1_2_3x5_12x20"),
    guidance=Guidance(1.5, "constant", 20),
    sampling=Sampling(50, 0.5, "7,12x20", 20),
    backend="ort-cpu",
)


def test_to_json_and_back() -> None:
    text = json.dumps(SETTINGS.to_json())
    assert Settings.from_json(json.loads(text), "a.png") == SETTINGS
    data = json.loads(text)
    assert (data["seed"], data["index"]) == ("18446744073709551615", "9223372036854775809")  # exact in any reader
    assert (data["class"], data["schedule"], data["version"]) == (7, "1_2_3x5_12x20", 1)
    assert data["sampling"]["greedy_scales"] == "7,12x20"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.pop("version"), "version"),
        (lambda data: data.pop("guidance"), "guidance"),
        (lambda data: data.update(seed=5), "5"),
        (lambda data: data.update(seed="-1"), "-1"),
        (lambda data: data.update(seed=str(2**64)), "18446744073709551616"),
        (lambda data: data.update(seed="1_000"), "1_000"),
        (lambda data: data.update(seed="٣"), "٣"),
        (lambda data: data.update(seed="9" * 10_000), "999"),
        (lambda data: data.update(index=1e400), "inf"),
        (lambda data: data.update({"class": "7"}), "class"),
        (lambda data: data.update({"class": -1}), "class"),
        (lambda data: data.update(schedule="2_3"), "schedule"),
        (lambda data: data.update(schedule=7), "7"),
        (lambda data: data["guidance"].update(scale=10**400), "scale"),
        (lambda data: data["guidance"].update(slope=1), "slope"),
        (lambda data: data.update(guidance=[1, 2]), "mapping"),
        (lambda data: data["sampling"].update(top_p=10**400), "top_p"),
        (lambda data: data["sampling"].update(temperature=1), "temperature"),
        (lambda data: data.update(sampling=None), "None"),
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data.update(bundle=["ab"]), "bundle"),
        (lambda data: data.update(backend="x" * 10_000), "backend"),
        (lambda data: data.update(edit=None), "a.png"),
        (lambda data: data.update(edit={"task": "refine"}), "picture_sha256"),
        (
            lambda data: data.update(edit={"task": "refine", "warmth": 1, "picture_sha256": "", "mask_sha256": None}),
            "warmth",
        ),
        (
            lambda data: data.update(edit={"task": ["refine"], "picture_sha256": "", "mask_sha256": None}),
            "refine",
        ),
    ],
)
def test_settings_that_are_not_valid(change: Callable[[Any], Any], fault: str) -> None:
    data = SETTINGS.to_json()
    change(data)
    with pytest.raises(ArtifactRefused) as refusal:
        Settings.from_json(data, "a.png")
    assert "a.png" in refusal.value.got and fault in refusal.value.got


def test_timings() -> None:
    scales = (ScaleTime((1, 1), 0.5, 0.25), ScaleTime((2, 3), 1.0, 0.5))
    timings = Timings(condition=0.125, scales=scales, decode=2.0, total=5.0)
    assert timings.sampling == 0.75
    assert json.loads(json.dumps(timings.to_json())) == {
        "condition": 0.125,
        "scales": [{"size": [1, 1], "step": 0.5, "sample": 0.25}, {"size": [2, 3], "step": 1.0, "sample": 0.5}],
        "decode": 2.0,
        "total": 5.0,
        "sampling": 0.75,
        "mode": "steps",
        "device": None,
    }


def test_to_pil() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    output = GenerationOutput(images, (), 0, Timings(0, (), 0, 0), (SETTINGS, SETTINGS))
    pictures = output.to_pil()
    assert [(picture.size, picture.mode) for picture in pictures] == [((6, 4), "RGB")] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), images)
