"""Schedules by quality: tables are read, checked, sorted, and written to the defaults of a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexvar_export import bundle
from flexvar_export.commands import _read_order
from flexvar_export.facts import PUBLISHED_DEFAULTS, read_defaults
from flexvar_export.quality import best_first, read_quality
from flexvar_runtime import ArtifactRefused, InvalidInput, ScaleSchedule
from flexvar_runtime.cli.main import main

DEFAULT = ScaleSchedule.parse("1_2_3_16")
DEMO = Path(__file__).parents[2] / "demo" / "model" / "quality.json"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "quality.json"


def test_a_plain_table(table: Path) -> None:
    table.write_text(json.dumps({"1_2_4": {"frechet": 3}, "1_2x3": {"accuracy": 0.5, "frechet": None}}))
    one, two = read_quality(table)
    assert (str(one.schedule), one.accuracy, one.frechet) == ("1_2_4", None, 3.0)
    assert (str(two.schedule), two.accuracy, two.frechet) == ("1_2x3", 0.5, None)


def test_of_the_demos_evaluation_only_what_differs_in_its_steps() -> None:
    """Neither other precisions and guidance nor other sizes nor real scenes."""
    rated = read_quality(DEMO)
    assert sorted(len(one.schedule) for one in rated) == [4, 5, 6, 7, 8, 9, 10]
    assert all(one.schedule[-1] == (16, 16) for one in rated)


def point(schedule: str, fid: float, **changes: object) -> dict[str, object]:
    """A point of `sweep.json`, with some of its keys."""
    given = {"name": "d16", "bundle": "1" * 64, "precision": "fp32", "guidance": {"scale": 1.5, "rule": "ramp"}}
    return given | {"schedule": schedule, "fid": fid, "recognised": None, "images": 5000} | changes


def test_of_a_sweep_only_the_schedules_of_the_first_bundle_and_guidance(table: Path) -> None:
    points = [
        point("1_2_4", 3.5, recognised=0.75),
        point("1_2_4", 2.5, guidance={"scale": 2.5, "rule": "ramp"}),
        point("1_4", 4.5),
        point("1_4", 1.5, bundle="2" * 64, precision="fp16"),
        point("1_4", 0.5, guidance={"scale": 1.5, "rule": "constant"}),
    ]
    table.write_text(json.dumps({"reference": {}, "seed": "0", "points": points}))
    one, other = read_quality(table)
    assert (str(one.schedule), one.accuracy, one.frechet) == ("1_2_4", 0.75, 3.5)
    assert (str(other.schedule), other.accuracy, other.frechet) == ("1_4", None, 4.5)


@pytest.mark.parametrize(
    "points",
    [
        3,
        [3],
        [point("1_x", 1.0)],
        [point("1_2", -1.0)],
        [point("1_2", 1.0), point("1_2", 1.0)],
        [point("1_2", 1.0), point("1_3", 1.0, images=240)],
        [{key: value for key, value in point("1_2", 1.0).items() if key != "fid"}],
    ],
)
def test_sweeps_refused(table: Path, points: object) -> None:
    table.write_text(json.dumps({"points": points}))
    with pytest.raises(ArtifactRefused, match=r"quality\.json"):
        read_quality(table)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "{",
        '{"1_x": {"frechet": 1}}',
        '{"1_2": 3}',
        '{"1_2": {"frechet": "3"}}',
        '{"1_2": {"frechet": true}}',
        '{"1_2": {"frechet": -1}}',
        '{"1_2": {"frechet": NaN}}',
        '{"1_2": {"frechet": 1}, "1x1_2x2": {"frechet": 2}}',
        '{"rows": [{"name": "4 steps"}]}',
        '{"1_2": {"frechet": 1, "images": 2000}, "1_3": {"frechet": 2, "images": 240}}',
        '{"rows": [{"name": "1 steps", "schedule": "1", "images": 9}, {"name": "2 steps", "schedule": "1_2"}]}',
        '{"rows": [{"name": "1 steps", "schedule": "1"}, {"name": "2 steps", "schedule": "1"}]}',
        '{"rows": [{"name": "1 steps", "schedule": "1_2"}, {"name": "2 steps", "schedule": "1x1_2x2"}]}',
        '{"1_2": {"frechet": 1, "fid": 3}}',
    ],
)
def test_tables_refused(table: Path, text: str) -> None:
    table.write_text(text)
    with pytest.raises(ArtifactRefused, match=r"quality\.json"):
        read_quality(table)


def test_best_first(table: Path) -> None:
    """The smallest distance first, of equal ones the shorter; what ends elsewhere or has no distance is left out."""
    distances = {"1_2_3_16": 2.0, "1_4_16": 1.0, "1_16": 2.0, "1_2_3_8": 0.1, "1_8_16": None, "1_2_8x16": 0.2}
    table.write_text(json.dumps({text: {"frechet": value} for text, value in distances.items()}))
    assert best_first(read_quality(table), DEFAULT) == ("1_4_16", "1_16", "1_2_3_16")
    with pytest.raises(InvalidInput, match="7x7"):
        best_first(read_quality(table), ScaleSchedule.parse("1_7"))


def test_an_order_becomes_a_bundles_default() -> None:
    order = _read_order(DEMO, PUBLISHED_DEFAULTS.schedule)
    assert order[0] == "1_3_8_16" and len(order) == 7
    assert order[-1] == PUBLISHED_DEFAULTS.schedule  # of as many images as the others
    assert replace(PUBLISHED_DEFAULTS, quality_order=order).quality_order == order
    with pytest.raises(ArtifactRefused, match="quality_order"):
        replace(PUBLISHED_DEFAULTS, quality_order=("1_2_4",))


def test_the_command_passes_the_order_on_and_refuses_before_it_exports(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, ...]] = []

    def export_bundle(*arguments: object, quality_order: tuple[str, ...], **options: object) -> None:
        asked.append(quality_order)
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle, "export_bundle", export_bundle)
    pair = table.parent / "a.pth", "--vae", table.parent / "b.pth"
    for path in pair[::2]:
        path.touch()

    def export(*options: str) -> object:
        with pytest.raises(SystemExit) as end:
            main(["export", *map(str, pair), "-o", str(table.parent / "a.bundle"), *options])
        return end.value.code

    assert export("--quality", str(DEMO)) == export() == 130
    assert [len(order) for order in asked] == [7, 0] and asked[0][0] == "1_3_8_16"
    table.write_text("[]")
    assert export("--quality", str(table)) == 5
    table.write_text('{"1_2_4": {"frechet": 1}}')
    assert export("--quality", str(table)) == 2
    assert "16x16" in capsys.readouterr().err and len(asked) == 2


def test_defaults_that_are_not_the_published_ones(tmp_path: Path) -> None:
    path = tmp_path / "defaults.json"
    path.write_text('{"schedule": "1_2_4", "guidance_scale": 3, "top_k": 0, "greedy_scales": "none"}')
    wanted = replace(PUBLISHED_DEFAULTS, schedule="1_2_4", guidance_scale=3.0, top_k=0, greedy_scales="none")
    assert read_defaults(path) == wanted
    assert replace(read_defaults(path), quality_order=("1_4",)).quality_order == ("1_4",)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "defaults.json"),
        ("[]", "defaults.json"),
        ('{"colour": 1}', "colour"),
        ('{"quality_order": []}', "quality_order"),
        ('{"top_k": "many"}', "top_k"),
        ('{"top_p": 2}', "top_p"),
        ('{"schedule": "2_4"}', "scale"),
        ('{"greedy_scales": "0"}', "greedy_scales"),
        (None, "defaults.json"),
    ],
)
def test_defaults_that_are_refused(tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "defaults.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInput, match=named):
        read_defaults(path)
