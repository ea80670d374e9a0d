"""Presets: the settings and the figures of published results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import flexvar_runtime
from flexvar_runtime import PRESETS, Guidance, InvalidInput, Preset, Sampling, preset
from flexvar_runtime.model.schedule import PUBLISHED

PAGE = Path(__file__).parents[3] / "docs" / "generating.md"
EXPECTED = {
    "flexvar-d16": (10, 2.5, "FlexVARd16-epo179.pth", 3.05, 291.3),
    "flexvar-d20": (10, 2.5, "FlexVARd20-epo249.pth", 2.41, 299.3),
    "flexvar-d24": (10, 2.5, "FlexVARd24-epo349.pth", 2.21, 299.1),
    "flexvar-13step": (13, 2.5, "FlexVARd24-epo349.pth", 2.08, None),
    "flexvar-512px": (15, 3.0, "FlexVARd24-epo349.pth", 4.43, None),
    "sar-d16": (10, 2.2, "SARd16-epo179.pth", 2.89, 266.6),
    "sar-d20": (10, 2.6, "SARd20-epo249.pth", 2.35, 293.3),
    "sar-d24": (10, 3.3, "SARd24-epo349.pth", 2.14, 315.5),
}


def test_all_presets() -> None:
    found = {
        name: (len(one.schedule), one.guidance.scale, one.weights, one.fid, one.inception_score)
        for name, one in PRESETS.items()
    }
    assert found == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset(name: str) -> None:
    one = preset(name)
    assert one is PRESETS[name] and one.name == name
    assert str(one.schedule) in PUBLISHED.values()
    assert one.schedule[-1] == ((32, 32) if name == "flexvar-512px" else (16, 16))
    assert one.guidance == Guidance(one.guidance.scale, "ramp", 16)
    assert one.sampling == Sampling(900, 0.95, "upstream", 16)
    assert one.source.startswith("arXiv 2512.06421" if name.startswith("sar-") else "arXiv 2502.20313")


def test_presets_cannot_be_changed() -> None:
    mapping: Any = PRESETS
    with pytest.raises(TypeError):
        mapping["own"] = PRESETS["flexvar-d16"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["flexvar-d16"].fid = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", ["flexvar", "FLEXVAR-D16", "", None, 16, ["flexvar-d16"]])
def test_an_unknown_name_is_refused_with_the_names(name: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^preset is ") as refusal:
        preset(name)
    assert all(known in refusal.value.expected for known in PRESETS)


def test_it_is_public() -> None:
    assert flexvar_runtime.PRESETS is PRESETS and flexvar_runtime.Preset is Preset
    assert flexvar_runtime.preset is preset


def test_the_page_has_the_same_figures() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in PRESETS}
    assert list(table) == list(PRESETS)
    for name, (weights, steps, cfg, fid, inception_score, source) in table.items():
        one = PRESETS[name]
        score = "not known" if one.inception_score is None else str(one.inception_score)
        assert weights.strip("`") == one.weights and int(steps) == len(one.schedule)
        assert (float(cfg), float(fid), inception_score) == (one.guidance.scale, one.fid, score)
        assert one.source.split(";")[0].removeprefix("arXiv ") in source
