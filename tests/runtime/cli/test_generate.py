"""`flexvar generate`: the files that it writes, repeating an image from its PNG, and files that it keeps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flexvar_runtime import FlexVARPipeline, Guidance, InvalidInput, OutOfMemory, Sampling, ScaleSchedule
from flexvar_runtime.backends import libraries
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.cli.options import check_targets, parse_labels
from flexvar_runtime.memory.plan import plan
from flexvar_runtime.pictures.pixels import to_uint8
from flexvar_runtime.pictures.png import read_metadata, save_png

SCHEDULE = "1_2_3x4_6_7_8x10"
BIG_SEED = 2**63 + 12345


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# Files ---------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_into_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """A file more would make the bundle one that is refused."""
    (tmp_path / "link").symlink_to(tiny_bundle)
    for folder in (tiny_bundle, tmp_path / "link"):
        with pytest.raises(InvalidInput, match="bundle"):
            check_targets([folder / "images" / "0.png"], force=True)
        assert not (folder / "images").exists()


def test_a_manifest_of_something_else_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    check_targets([tmp_path / "images" / "0.png"], force=False)
    assert (tmp_path / "images").is_dir()


def test_without_classes(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    ended = flexvar("generate", tiny_bundle, "-o", out)
    assert ended.refused(2, "--classes") and not out.exists()


def test_a_warning_about_sizes_far_from_the_default(flexvar: Any, bundle_copy: Path, out: Path) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["defaults"]["schedule"] = "1_2"
    path.write_text(json.dumps(document))
    ended = flexvar("generate", bundle_copy, "-o", out, "--classes", "1", "--schedule", "1_6")
    assert ended.code == 0 and "default" not in ended.err
    ended = flexvar("generate", bundle_copy, "-o", out, "--classes", "1", "--schedule", "1_7", "--force")
    assert ended.code == 0 and "default" in ended.err and "3 times" in ended.err


def test_no_steps_are_not_the_default(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    ended = flexvar("generate", tiny_bundle, "-o", out, "--classes", "1", "--steps", "0")
    assert ended.refused(2, "steps", "0") and not out.exists()


def test_a_size_and_steps_derive_the_schedule(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    arguments = ("generate", tiny_bundle, "-o", out, "--classes", "1", "--size", "24x32")
    ended = flexvar(*arguments, "--steps", "4", "--json")
    assert ended.json["schedule"] == str(ScaleSchedule.for_size((6, 8), 4)) and pixels(
        out / "000000_class0001.png"
    ).shape == (24, 32, 3)
    for extra, fault in ((("--schedule", "1_2"), "--schedule"), (("--size", "25x32"), "25x32")):
        assert flexvar(*arguments, *extra, "--force").refused(2, fault)


def test_a_preset_replaces_the_defaults_of_the_bundle(flexvar: Any, bundle_copy: Path, out: Path) -> None:
    """It equals its settings spelt out. Options beside it replace one field at a time."""
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["defaults"] |= {"schedule": "1_2", "guidance_scale": 4.0, "guidance_rule": "constant", "top_k": 5}
    document["defaults"] |= {"top_p": 0.5, "greedy_scales": "none", "max_side": 4}
    path.write_text(json.dumps(document))
    arguments = ("generate", bundle_copy, "--classes", "1", "--seed", 3, "--json")
    ended = flexvar(*arguments, "-o", out, "--preset", "sar-d16")
    spelt = (
        *("--schedule", "1_2_3_4_5_6_8_10_13_16", "--cfg", "2.2", "--guidance", "ramp", "--top-k", 900),
        *("--top-p", "0.95", "--greedy-scales", "upstream", "--max-side", 16),
    )
    same = flexvar(*arguments, "-o", out.with_name("spelt"), *spelt)
    assert (ended.code, same.code) == (0, 0)
    keys = ("schedule", "guidance", "sampling")
    assert {key: ended.json[key] for key in keys} == {key: same.json[key] for key in keys}
    [name] = files(out)
    assert (out / name).read_bytes() == (out.with_name("spelt") / name).read_bytes()
    options = ("--preset", "flexvar-512px", "--steps", 6, "--size", "16x16", "--cfg", 1.5, "--top-p", 0.8)
    other = flexvar(*arguments, "-o", out, "--force", *options).json
    assert other["schedule"] == str(ScaleSchedule.for_size((4, 4), 6, 2))
    assert other["guidance"] == ended.json["guidance"] | {"scale": 1.5}
    assert other["sampling"] == ended.json["sampling"] | {"top_p": 0.8}


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        (("--preset", "flexvar-d16", "--from", "none.png"), ("--preset", "--from")),
        (("--preset", "flexvar-d16", "--deadline-ms", 100), ("--preset", "--deadline-ms")),
        (("--preset", "flexvar"), ("preset is 'flexvar'", "flexvar-d16", "sar-d24")),
    ],
)
def test_presets_that_are_refused(flexvar: Any, out: Path, options: tuple[Any, ...], faults: tuple[str, ...]) -> None:
    """Before a bundle is opened."""
    ended = flexvar("generate", "none", "-o", out, "--classes", "1", *options)
    assert ended.refused(2, *faults) and not out.exists()


def test_a_class_name_that_two_classes_have_is_refused() -> None:
    names = ("tench", "crane", "shark", "crane")
    assert parse_labels("tench, 2,shark", names) == [0, 2, 2]
    with pytest.raises(InvalidInput, match=r"'crane'.* 1, 3"):
        parse_labels("crane", names)


def test_one_png_an_image(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    """The same pixels and settings as the Python call, whatever the batch."""
    arguments = ("--classes", "3, 7,10", "--schedule", SCHEDULE, "--seed", BIG_SEED, "--first-index", 5)
    ended = flexvar("generate", tiny_bundle, "-o", out, *arguments)
    assert ended.code == 0
    names = ["000005_class0003.png", "000006_class0007.png", "000007_class0010.png"]
    assert files(out) == names
    lines = ended.out.splitlines()
    assert lines[:3] == [str(out / name) for name in names]
    assert lines[3].startswith("3 images in ") and lines[3].endswith(
        f" s on ort-cpu, seed {BIG_SEED}, schedule {SCHEDULE}"
    )
    assert "generate 6/6: scale 6/6, 8x10 tokens" in ended.err and "generate" not in ended.out
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        expected = pipeline([3, 7, 10], SCHEDULE, seed=BIG_SEED, first_index=5)
    for name, image, settings in zip(names, expected.images, expected.settings, strict=True):
        np.testing.assert_array_equal(pixels(out / name), image)
        assert read_metadata(out / name) == settings.to_json()
    ended = flexvar("generate", tiny_bundle, "-o", out.with_name("again"), *arguments, "--batch-size", 2)
    assert "generate 12/12: scale 6/6" in ended.err
    for name in names:
        assert (out.with_name("again") / name).read_bytes() == (out / name).read_bytes()


def test_json(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    ended = flexvar(
        *("generate", tiny_bundle, "-o", out, "--classes", "1,2,3", "--schedule", "1_2_4", "--seed", 2**64 - 1),
        *("--first-index", 2**64 - 3, "--batch-size", 2, "--json", "--greedy-scales", "2"),
    )
    assert ended.code == 0
    data = ended.json  # nothing else on standard output
    assert (data["seed"], data["first_index"]) == (str(2**64 - 1), str(2**64 - 3))
    assert (data["backend"], data["schedule"], data["sampling"]["greedy_scales"]) == ("ort-cpu", "1_2_4", "2")
    assert [image["class"] for image in data["images"]] == [1, 2, 3]
    assert all(Path(image["file"]).exists() for image in data["images"])
    assert [len(timings["scales"]) for timings in data["timings"]] == [3, 3]
    for timings in data["timings"]:
        parts = [scale[part] for scale in timings["scales"] for part in ("step", "sample")]
        assert sum(parts) + timings["condition"] + timings["decode"] <= timings["total"]
        assert timings["sampling"] > 0
    assert "generate 6/6" in ended.err


def test_arrays(flexvar: Any, tiny_bundle: Path, out: Path, tmp_path: Path) -> None:
    ended = flexvar(
        *("generate", tiny_bundle, "-o", out, "--classes", "1,2,3", "--schedule", SCHEDULE, "--seed", 1),
        *("--batch-size", 2, "--save-arrays", tmp_path / "deep" / "er" / "arrays"),
    )
    assert ended.code == 0
    with np.load(tmp_path / "deep" / "er" / "arrays") as arrays:
        tokens, images = arrays["tokens"], arrays["images"]
    total = ScaleSchedule.parse(SCHEDULE).tokens
    assert tokens.shape == (3, total) and tokens.dtype == np.int32
    assert images.shape == (3, 3, 32, 40) and images.dtype == np.float32
    for i, name in enumerate(files(out)):
        np.testing.assert_array_equal(to_uint8(images)[i], pixels(out / name))
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        expected = pipeline([1, 2, 3], SCHEDULE, seed=1)
    np.testing.assert_array_equal(tokens, np.concatenate([t.reshape(3, -1) for t in expected.tokens], axis=1))


def test_a_preview_of_every_scale(flexvar: Any, tiny_bundle: Path, out: Path, tmp_path: Path) -> None:
    arguments = ("--classes", "1,2,3", "--schedule", "1_2_3x4_6", "--seed", 1, "--batch-size", 2)
    assert flexvar("generate", tiny_bundle, "-o", out, *arguments, "--preview", tmp_path / "scales").code == 0
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        steps = list(pipeline.iter_scales([1, 2, 3], "1_2_3x4_6", seed=1))
        previews = [step.preview() for step in steps]
    expected = set()
    for i, image in enumerate(files(out)):
        for step, preview in zip(steps, previews, strict=True):
            h, w = step.size
            name = f"{Path(image).stem}_scale{step.index + 1:02d}_{h}x{w}.png"
            expected.add(name)
            np.testing.assert_array_equal(pixels(tmp_path / "scales" / name), preview[i])
            assert read_metadata(tmp_path / "scales" / name) == {"preview_of": image, "scale": step.index + 1}
        np.testing.assert_array_equal(preview[i], pixels(out / image))
    assert set(files(tmp_path / "scales")) == expected


def test_classes_by_name(flexvar: Any, bundle_copy: Path, out: Path) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["model"]["class_names"] = ["crème brûlée", "cat", *map(str, range(20, 28))]
    path.write_text(json.dumps(document))
    arguments = ("generate", bundle_copy, "-o", out, "--schedule", "1", "--classes")
    assert flexvar(*arguments, "crème brûlée, cat,5").code == 0
    assert files(out) == ["000000_class0000.png", "000001_class0001.png", "000002_class0005.png"]
    shown = " ".join(flexvar("inspect", bundle_copy).out.replace("│", "").split())
    assert "0 crème brûlée, 1 cat, 2 20, 3 21" in shown
    with FlexVARPipeline.from_bundle(bundle_copy, "ort-cpu") as pipe:
        named, numbered = pipe(["cat", 5], "1", seed=0), pipe([1, 5], "1", seed=0)
        assert named.settings == numbered.settings
        with pytest.raises(InvalidInput, match="dog"):
            pipe(["dog"])
    assert flexvar(*arguments, "dog").refused(2, "--classes", "dog", "'crème brûlée', 'cat', '20', '21', '22'")
    for near in ("creme brulee", "Creme Brulee"):
        ended = flexvar(*arguments, near)
        assert ended.refused(2, "--classes", near, "crème brûlée") and "cat" not in ended.err


# The same image again ------------------------------------------------------------------------------------------------

OPTIONS = (
    *("--schedule", SCHEDULE, "--cfg", "1.75", "--guidance", "constant", "--top-k", "40", "--top-p", "0.9"),
    *("--greedy-scales", "7,3x4", "--max-side", "5", "--seed", BIG_SEED, "--first-index", 2**63),
)


@pytest.fixture
def batch(flexvar: Any, tiny_bundle: Path, tmp_path: Path) -> Path:
    """Eight images with nothing left at its default."""
    ended = flexvar("generate", tiny_bundle, "-o", tmp_path / "batch", "--classes", "0,1,2,3,4,5,6,7", *OPTIONS)
    assert ended.code == 0
    return tmp_path / "batch"


def test_from_a_png_of_a_batch(flexvar: Any, tiny_bundle: Path, batch: Path, out: Path) -> None:
    for name in (files(batch)[5], files(batch)[0]):
        ended = flexvar("generate", tiny_bundle, "--from", batch / name, "-o", out, "--json")
        assert ended.code == 0 and ended.json["seed"] == str(BIG_SEED)
        assert (out / name).read_bytes() == (batch / name).read_bytes()  # pixels and settings
    settings = read_metadata(out / files(batch)[5])
    assert settings["index"] == str(2**63 + 5) and settings["class"] == 5
    assert settings["sampling"] == {"top_k": 40, "top_p": 0.9, "greedy_scales": "3x4,7", "max_side": 5}
    assert settings["guidance"] == {"scale": 1.75, "rule": "constant", "max_side": 5}


def test_from_a_png_of_another_backends_name_and_threads(
    flexvar: Any, tiny_bundle: Path, batch: Path, out: Path
) -> None:
    name = files(batch)[3]
    arguments = ("--from", batch / name, "-o", out, "--threads", 1, "--backend", "ort-cpu")
    assert flexvar("generate", tiny_bundle, *arguments).code == 0
    assert (out / name).read_bytes() == (batch / name).read_bytes()


def test_options_beside_a_png_replace_its_own(flexvar: Any, tiny_bundle: Path, batch: Path, out: Path) -> None:
    name = files(batch)[5]
    ended = flexvar(
        *("generate", tiny_bundle, "--from", batch / name, "-o", out, "--classes", "2,3", "--cfg", 3, "--seed", 4),
        *("--first-index", 9),
    )
    assert ended.code == 0 and files(out) == ["000009_class0002.png", "000010_class0003.png"]
    old, new = read_metadata(batch / name), read_metadata(out / "000009_class0002.png")
    assert new == old | {"class": 2, "seed": "4", "index": "9", "guidance": old["guidance"] | {"scale": 3.0}}


def test_a_preview_or_a_stripped_png_has_no_settings(
    flexvar: Any, tiny_bundle: Path, batch: Path, out: Path, tmp_path: Path
) -> None:
    Image.open(batch / files(batch)[0]).save(tmp_path / "stripped.png")
    ended = flexvar("generate", tiny_bundle, "--from", tmp_path / "stripped.png", "-o", out, "--json")
    assert ended.refused(5, "stripped.png") and "stripped.png" in ended.json["error"]["got"]
    save_png(tmp_path / "preview.png", np.zeros((4, 4, 3), np.uint8), {"preview_of": "x.png", "scale": 1})
    ended = flexvar("generate", tiny_bundle, "--from", tmp_path / "preview.png", "-o", out)
    assert ended.refused(5, "preview.png")
    assert not out.exists()


def test_a_png_with_changed_settings(flexvar: Any, tiny_bundle: Path, batch: Path, out: Path, tmp_path: Path) -> None:
    """The rules of the settings are those of `Settings.from_json`; here they are named with the file."""
    settings = read_metadata(batch / files(batch)[0])
    changed: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bundle": "0" * 64}, "bundle 0000000000000000"),
        ({"class": 1e400}, "Infinity"),
        ({"schedule": "3_4"}, "schedule"),
    )
    for change, fault in changed:
        save_png(tmp_path / "changed.png", np.zeros((4, 4, 3), np.uint8), settings | change, force=True)
        ended = flexvar("generate", tiny_bundle, "--from", tmp_path / "changed.png", "-o", out, "--json")
        assert ended.refused(5, "changed.png", fault) and ended.json["error"]["type"] == "ArtifactRefused"
    assert not out.exists()


def test_a_png_of_another_bundle(flexvar: Any, bundle_copy: Path, batch: Path, out: Path) -> None:
    path = bundle_copy / "manifest.json"
    path.write_text(path.read_text() + "\n")  # the same content, other bytes
    ended = flexvar("generate", bundle_copy, "--from", batch / files(batch)[0], "-o", out)
    assert ended.refused(5, files(batch)[0], "bundle")


def test_a_file_that_is_no_png(flexvar: Any, tiny_bundle: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        assert flexvar("generate", tiny_bundle, "--from", tmp_path / name, "-o", out).refused(5, name)


# Existing files are kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("file", "out/000001_class0002.png"),
        ("link", "scales/000001_class0002_scale03_4x4.png"),
        ("link", "arrays.npz"),
        ("directory", "arrays.npz"),
        ("directory", "out/000001_class0002.png"),
    ],
)
def test_existing_files_are_kept(flexvar: Any, tiny_bundle: Path, tmp_path: Path, target: str, kind: str) -> None:
    """Refused before anything is computed or written."""
    path = tmp_path / target
    path.parent.mkdir(exist_ok=True)
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
    arguments = (
        *("generate", tiny_bundle, "-o", tmp_path / "out", "--classes", "1,2", "--schedule", "1_2_4", "--seed", 3),
        *("--preview", tmp_path / "scales", "--save-arrays", tmp_path / "arrays.npz"),
    )
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    ended = flexvar(*arguments)
    advice = "directory" if kind == "directory" else "--force"
    assert ended.refused(2, path, advice) and "generate 1/" not in ended.err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    ended = flexvar(*arguments, "--force")
    if kind == "directory":
        assert ended.refused(2, path, "directory")
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    else:
        assert ended.code == 0 and path.is_file() and not path.is_symlink() and path.read_bytes() != b"mine"
        assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arrays", "others"),
    [
        ("out/000000_class0001.png", ()),
        ("out/../out/000001_class0002.png", ("--force",)),
        ("link/000000_class0001.png", ("--force",)),
        ("out", ()),
        ("scales/000000_class0001_scale01_1x1.png", ("--preview", "scales")),
    ],
)
def test_arrays_cannot_replace_what_the_run_writes(
    flexvar: Any,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrays: str,
    others: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("out")
    ended = flexvar("generate", tiny_bundle, "-o", "out", "--classes", "1,2", "--save-arrays", arrays, *others)
    assert ended.refused(2, arrays) and "generate 1/" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("option", ["-o", "--preview", "--save-arrays"])
def test_a_file_where_a_directory_should_be(flexvar: Any, tiny_bundle: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    options = {"-o": tmp_path / "out", "--preview": tmp_path / "scales", "--save-arrays": tmp_path / "arrays.npz"}
    options[option] = tmp_path / "taken" / "x" if option == "--save-arrays" else tmp_path / "taken"
    ended = flexvar("generate", tiny_bundle, "--classes", "1", *(part for pair in options.items() for part in pair))
    assert ended.refused(2, tmp_path / "taken", "directory") and "generate 1/" not in ended.err
    assert (tmp_path / "taken").read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="to root every directory is writable")
def test_a_directory_that_cannot_be_written(flexvar: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ended = flexvar("generate", tiny_bundle, "--classes", "1", "-o", tmp_path / "out")
    tmp_path.chmod(0o700)
    assert ended.code == 2 and "Permission denied" in ended.err


def test_nothing_is_half_written(
    flexvar: Any, tiny_bundle: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch fails: the first is there, whole; no arrays, no partial file."""
    calls = []

    def fail_later(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise OutOfMemory("A buffer does not fit.", expected="one that fits", fix="Use a smaller batch.")
        return real(*arguments, **options)

    import flexvar_runtime.generation.host as module

    real = module.sample
    monkeypatch.setattr(module, "sample", fail_later)
    ended = flexvar(
        *("generate", tiny_bundle, "-o", out, "--classes", "1,2,3", "--schedule", "1_2_4", "--batch-size", 2),
        *("--save-arrays", tmp_path / "arrays.npz", "--preview", tmp_path / "scales"),
    )
    assert ended.code == 6 and ended.out == ""
    assert files(out) == ["000000_class0001.png", "000001_class0002.png"]
    assert all(pixels(out / name).shape == (16, 16, 3) for name in files(out))
    assert files(tmp_path / "scales") == [
        *(f"00000{i}_class000{i + 1}_scale0{s}_{n}x{n}.png" for i in (0, 1) for s, n in ((1, 1), (2, 2), (3, 4))),
        "000002_class0003_scale01_1x1.png",
    ]
    assert not (tmp_path / "arrays.npz").exists() and not list(tmp_path.rglob(".*"))


# Memory --------------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_the_batch_that_fits(
    flexvar: Any, tiny_bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        manifest = pipeline.bundle.manifest
    schedule = ScaleSchedule.parse(SCHEDULE)
    left = plan(manifest, schedule, 4, True, libraries("ort-cpu", manifest.precision), decoded_at_once=1).needed() - 1
    monkeypatch.setattr(OrtCpu, "available_bytes", lambda self: left)
    arguments = ("generate", tiny_bundle, "-o", out, "--classes", "1,2,3,4,5", "--schedule", SCHEDULE, "--seed", 1)
    ended = flexvar(*arguments, "--json")
    assert ended.refused(6, "batch of 5", SCHEDULE) and ended.json["error"]["type"] == "OutOfMemory"
    assert "at most 3" in ended.json["error"]["fix"]
    assert files(out) == []
    assert flexvar(*arguments, "--batch-size", 3).code == 0
    monkeypatch.undo()
    for name in files(out):
        shutil.move(out / name, out / f"little_{name}")
    assert flexvar(*arguments).code == 0
    for name in files(out)[:5]:
        assert (out / name).read_bytes() == (out / f"little_{name}").read_bytes()


def test_guidance_off_takes_no_options_along(flexvar: Any, tiny_bundle: Path, out: Path) -> None:
    arguments = ("generate", tiny_bundle, "-o", out, "--classes", "1", "--schedule", "1_2_4", "--seed", 1)
    assert flexvar(*arguments, "--cfg", 0).code == 0
    with FlexVARPipeline.from_bundle(tiny_bundle) as pipeline:
        expected = pipeline([1], "1_2_4", Guidance(1, "constant"), Sampling(), seed=1)
    np.testing.assert_array_equal(pixels(out / "000000_class0001.png"), expected.images[0])
