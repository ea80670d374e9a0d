"""`flexvar edit`: the file that it writes, repeating an edit from that file, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.pictures.png import read_metadata, save_png

SMALL = ("--size", "24x32", "--schedule", "1_2_3x4_6x8")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    y, x = np.mgrid[:48, :64] / 12
    pixels = np.stack([(np.sin(x * (c + 1) + y + c) * 120 + 128).astype(np.uint8) for c in range(3)], axis=-1)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    drawn = np.zeros((48, 64), np.uint8)
    drawn[16:, 32:] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    "options",
    [
        ("--task", "refine", *SMALL, "--strength", "0.5", "--class", "3"),
        ("--task", "inpaint", *SMALL, "--paste", "--feather", "4"),
        ("--task", "outpaint", "--size", "16x16", "--right", "8", "--steps", "4", "--fit", "crop"),
        ("--task", "expand", "--size", "24x48", "--anchor", "left", "--steps", "4", "--class", "3", "--cfg", "4"),
    ],
    ids=lambda options: options[1],
)
def test_an_edit_can_be_repeated(
    flexvar: Any, tiny_bundle: Path, photo: Path, mask: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    extra = ("--mask", mask) if "inpaint" in options else ()
    first, again = tmp_path / "new" / "one.png", tmp_path / "two.png"
    ended = flexvar("edit", tiny_bundle, "--image", photo, "-o", first, *options, *extra)
    assert ended.code == 0 and ended.out.splitlines()[0] == str(first)
    assert flexvar("edit", tiny_bundle, "--image", photo, "--from", first, "-o", again, *extra).code == 0
    assert first.read_bytes() == again.read_bytes()
    settings = read_metadata(first)
    assert settings["edit"]["task"] == options[1] and len(settings["edit"]["picture_sha256"]) == 64
    other = flexvar("edit", tiny_bundle, "--image", photo, "--from", first, "-o", again, "--force", "--seed", 7, *extra)
    assert other.code == 0 and not np.array_equal(pixels(first), pixels(again))


def test_the_same_as_in_python(flexvar: Any, tiny_bundle: Path, photo: Path, mask: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = ("--task", "inpaint", "--image", photo, "--mask", mask, "-o", out, *SMALL, "--seed", 9, "--json")
    ended = flexvar("edit", tiny_bundle, *options)
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipe:
        expected = pipe.edit(photo, "inpaint", mask=mask, size=(24, 32), schedule=SMALL[3], seed=9)
    assert np.array_equal(pixels(out), expected.images[0])
    assert ended.json["file"] == str(out) and ended.json["seed"] == "9"
    assert read_metadata(out) == expected.settings[0].to_json()
    assert ended.json["edit"] == json.loads(json.dumps(expected.settings[0].to_json()["edit"]))


def test_another_picture_is_logged(flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    first = tmp_path / "one.png"
    assert flexvar("edit", tiny_bundle, "--task", "refine", "--image", photo, "-o", first, *SMALL).code == 0
    Image.fromarray(255 - pixels(photo)).save(tmp_path / "other.png")
    ended = flexvar("edit", tiny_bundle, "--image", tmp_path / "other.png", "--from", first, "-o", tmp_path / "two.png")
    assert ended.code == 0 and "--from" in ended.err
    assert ended.err.count("48x64") == 1 and ended.err.count("24x32") == 1
    options = ("--task", "outpaint", "--left", 8, "--image", photo, "--from", first, "-o", tmp_path / "three.png")
    ended = flexvar("edit", tiny_bundle, *options)
    assert ended.code == 0 and "--from" not in ended.err


def test_another_size_than_in_from_gets_its_own_schedule(
    flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "one.png", tmp_path / "two.png"
    assert flexvar("edit", tiny_bundle, "--task", "refine", "--image", photo, "-o", first, *SMALL).code == 0
    ended = flexvar("edit", tiny_bundle, "--image", photo, "--from", first, "-o", second, "--size", "32x40", "--json")
    assert ended.code == 0 and ended.json["schedule"].endswith("_8x10") and pixels(second).shape == (32, 40, 3)


def test_previews_and_progress(flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    arguments = ("edit", tiny_bundle, "--task", "refine", "--image", photo, "-o", tmp_path / "out.png", *SMALL)
    ended = flexvar(*arguments, "--preview", tmp_path / "scales", "--progress")
    names = ["out_scale01_1x1.png", "out_scale02_2x2.png", "out_scale03_3x4.png", "out_scale04_6x8.png"]
    assert sorted(path.name for path in (tmp_path / "scales").iterdir()) == names
    assert "out.png, scale 3/4" in ended.err
    assert np.array_equal(pixels(tmp_path / "scales" / names[-1]), pixels(tmp_path / "out.png"))
    assert flexvar(*arguments, "--force", "--preview", tmp_path / "scales").code == 0
    (tmp_path / "out.png").unlink()
    ended = flexvar(*arguments, "--preview", tmp_path / "scales")
    assert ended.code == 2 and "out_scale01_1x1.png" in ended.err and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--task", "refine", "--size", "24"), "--size"),
        (("--task", "refine", "-o", "out.jpg"), "Write out.png"),
        (("--task", "refine", "-o", "."), "edited.png"),
        (("--task", "refine", "-o", "/"), "/edited.png"),
        (("--task", "refine", "-o", "none/.."), "--output"),
        ((), "--task"),
        (("--task", "refine", "--paste"), "paste"),
        (("--task", "refine", "--class", "3,4"), "--class"),
        (("--task", "refine", "--class", "cat"), "--class"),
        (("--task", "refine", "--image", "nothing.png"), "nothing.png"),
    ],
)
def test_refusals(
    flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    image = () if "--image" in options else ("--image", photo)
    ended = flexvar("edit", tiny_bundle, "-o", tmp_path / "out.png", *image, *options)
    assert ended.refused(2, fault) and not (tmp_path / "out.png").exists()


def test_existing_files_are_kept(flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "out.png").write_text("mine")
    arguments = ("edit", tiny_bundle, "--task", "refine", "--image", photo, "-o", tmp_path / "out.png", *SMALL)
    assert flexvar(*arguments).code == 2 and (tmp_path / "out.png").read_text() == "mine"
    assert flexvar(*arguments, "--force").code == 0


def test_settings_of_the_other_command_are_refused(
    flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    edited, generated = tmp_path / "edited.png", tmp_path / "images"
    assert flexvar("edit", tiny_bundle, "--task", "refine", "--image", photo, "-o", edited, *SMALL).code == 0
    assert flexvar("generate", tiny_bundle, "--classes", 1, "--schedule", "1_2", "-o", generated).code == 0
    (made,) = generated.iterdir()
    ended = flexvar("generate", tiny_bundle, "--from", edited, "-o", tmp_path / "more")
    assert ended.refused(5, "edited.png", "flexvar edit with --from")
    ended = flexvar("edit", tiny_bundle, "--from", made, "--image", photo, "-o", tmp_path / "again.png")
    assert ended.refused(5, made.name, "flexvar generate with --from")


def test_a_given_side_leaves_the_others_of_from(flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "one.png", tmp_path / "two.png"
    more = ("--size", "16x16", "--left", 8, "--right", 8, "--steps", 4)
    assert flexvar("edit", tiny_bundle, "--task", "outpaint", "--image", photo, "-o", first, *more).code == 0
    ended = flexvar("edit", tiny_bundle, "--image", photo, "--from", first, "-o", second, "--left", 4, "--json")
    assert ended.code == 0 and ended.json["edit"]["sides"] == [0, 8, 0, 4] and pixels(second).shape == (16, 28, 3)
    scales = read_metadata(first)["schedule"].count("_") + 1
    assert ended.json["schedule"] == str(ScaleSchedule.for_size((4, 7), scales))


def test_another_picture_of_other_proportions(flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "one.png", tmp_path / "two.png"
    options = ("--task", "refine", "--steps", 4, "--strength", 0.5)
    assert flexvar("edit", tiny_bundle, "--image", photo, "-o", first, *options).code == 0
    Image.fromarray(pixels(photo)[:, :16]).save(tmp_path / "tall.png")
    ended = flexvar("edit", tiny_bundle, "--image", tmp_path / "tall.png", "--from", first, "-o", second, "--json")
    assert ended.code == 0 and ended.json["schedule"].count("_") == read_metadata(first)["schedule"].count("_")


def test_options_that_are_left_behind(flexvar: Any, tiny_bundle: Path, photo: Path, mask: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in ("one", "two", "three"))
    options = ("--task", "inpaint", "--mask", mask, "--paste", "--feather", 4, *SMALL)
    assert flexvar("edit", tiny_bundle, "--image", photo, "-o", first, *options).code == 0
    plain = flexvar("edit", tiny_bundle, "--image", photo, "--mask", mask, "--from", first, "-o", second, "--no-paste")
    assert plain.code == 0 and read_metadata(second)["edit"]["feather"] == 0
    assert flexvar("edit", tiny_bundle, "--image", photo, "--from", first, "-o", third, "--task", "refine").code == 0


def test_the_largest_side_alone_asks_for_no_guidance(
    flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path
) -> None:
    options = ("edit", tiny_bundle, "--task", "refine", "--image", photo, *SMALL, "--max-side", 8, "--json")
    ended = flexvar(*options, "-o", tmp_path / "one.png")
    assert ended.json["guidance"]["scale"] == 0 and ended.json["sampling"]["max_side"] == 8
    ended = flexvar(*options, "-o", tmp_path / "two.png", "--class", 3)
    assert ended.json["guidance"]["scale"] > 0 and ended.json["guidance"]["max_side"] == 8


@pytest.mark.parametrize(
    "change",
    [
        {"size": [2**20, 2**20]},
        {"task": "outpaint", "size": [24, 32], "sides": [2**20] * 4},
        {"task": "expand", "size": [24, 2**15], "anchor": "top"},
        {"size": [24, 32], "colour": "red"},
        {"size": [24, 32], "strength": 1e300},
    ],
    ids=["size", "sides", "canvas", "unknown key", "strength"],
)
def test_recorded_edits_that_ask_for_too_much_are_refused(
    flexvar: Any, tiny_bundle: Path, photo: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu") as pipe:
        settings = pipe.edit(photo, "refine", size=(24, 32), schedule="1_2_3x4_6x8", seed=0).settings[0].to_json()
    common = {name: settings["edit"][name] for name in ("picture_sha256", "mask_sha256")}
    settings["edit"] = {"task": "refine", **common, **change}
    save_png(tmp_path / "from.png", np.zeros((4, 4, 3), np.uint8), settings)
    ended = flexvar("edit", tiny_bundle, "--image", photo, "--from", tmp_path / "from.png", "-o", tmp_path / "o.png")
    assert ended.code == 5 and "from.png" in ended.err and not (tmp_path / "o.png").exists()
