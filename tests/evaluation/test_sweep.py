"""`flexvar evaluate sweep`: one run for each setting, each compared with the first, a table, a file and a plot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_network import write_tiny_network

from flexvar_evaluation.runs.settings import read_settings
from flexvar_evaluation.sweep import parse_numbers
from flexvar_runtime.cli.main import main as command_line
from flexvar_runtime.errors import InvalidInput


def main(*arguments: object) -> int:
    """The exit code of a command of `flexvar evaluate`."""
    with pytest.raises(SystemExit) as ended:
        command_line(["evaluate", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def reference(tiny_network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    np.savez(folder / "real.npz", np.random.default_rng(3).integers(0, 256, (30, 6, 6, 3), np.uint8))
    assert main("reference", folder / "real.npz", "--network", tiny_network, "-o", folder / "real.ref") == 0
    return folder / "real.ref"


@pytest.fixture
def bundles(ordered_bundle: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """Two bundles of the tiny model with a schedule of few tokens."""
    bundle = ordered_bundle("1_2_5", ["1_2_5"])
    return [Path(shutil.copytree(bundle, tmp_path / name)) for name in ("one.bundle", "two.bundle")]


def test_a_sweep(
    bundles: list[Path], tiny_network: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", *bundles, "-o", tmp_path / "sweep", "--reference", reference, "--network", tiny_network]
    command += ["--count", 16, "--steps", "2,4", "--cfg", "0,2.5", "--backend", "ort-cpu", "--threads", 1, "--json"]
    assert main(*command) == 0
    result = json.loads(capsys.readouterr().out)
    names = [f"{bundle}_{steps}steps_cfg{cfg}" for bundle in ("one", "two") for steps in (2, 3) for cfg in ("0", "2.5")]
    points = {point["name"]: point for point in result["points"]}
    assert list(points) == names and json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == result
    for name, point in points.items():
        settings = read_settings(tmp_path / "sweep" / name)
        assert (settings.count, str(settings.first.schedule)) == (16, point["schedule"])
        assert settings.first.guidance.to_json() == point["guidance"] and point["images"] == 16
        assert len(settings.first.schedule) == point["steps"] and point["bundle_precision"] == "fp32"
        low, high = point["fid_interval"]
        assert low < point["fid"] < high
    first = points.pop(names[0])
    assert "against_first" not in first
    for point in points.values():
        assert point["against_first"]["difference"] == pytest.approx(point["fid"] - first["fid"])
    assert points[names[4]]["against_first"]["difference"] == 0  # the same model in another folder
    with Image.open(tmp_path / "sweep" / "sweep.png") as plot:
        assert plot.width > 500 and len(np.unique(np.asarray(plot.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    score = ["score", tmp_path / "sweep" / names[3], "--reference", reference, "--json"]
    assert main(*score) == 0
    assert json.loads(capsys.readouterr().out)["fid"] == points[names[3]]["fid"]


def test_bundles_of_one_name_are_refused(
    bundles: list[Path], tiny_network: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(bundles[0], tmp_path / "elsewhere" / "one"))
    command = ["sweep", bundles[0], other, "-o", tmp_path / "x", "--reference", reference, "--network", tiny_network]
    assert main(*command) == 2
    assert "Two bundles have the name 'one'" in capsys.readouterr().err


def test_everything_is_checked_before_the_first_image(
    bundles: list[Path],
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tiny_network: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = write_tiny_network(tmp_path / "other.onnx", seed=1)
    command = ["sweep", *bundles, "-o", tmp_path / "x", "--reference", reference]
    assert main(*command, "--network", other) == 2
    assert "The features come from the network" in capsys.readouterr().err
    assert main(*command, "--network", tiny_network, "--cfg", "1.5,1e9") == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(*command, "--network", tiny_network) == 2
    assert "runs in one process" in capsys.readouterr().err
    assert not any((tmp_path / "x").iterdir())


def test_steps_with_the_same_schedule_are_refused(
    bundles: list[Path], tiny_network: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", bundles[0], "-o", tmp_path / "x", "--reference", reference, "--network", tiny_network]
    assert main(*command, "--steps", "2,3") == 2
    assert "Two numbers of --steps give the same schedule 1_5" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "6,", "6,6", "a", "-1", "nan", "6;8"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--cfg"):
        parse_numbers("--cfg", text, float)


@pytest.fixture
def page(bundles: list[Path], tiny_network: Path, reference: Path, tmp_path: Path) -> list[object]:
    """A command that writes a page."""
    run = tmp_path / "run"
    options = ["--count", 40, "--shard-size", 9, "--schedule", "1_2_3", "--backend", "ort-cpu", "--threads", 1]
    assert main("sample", bundles[0], "-o", run, "--network", tiny_network, *options) == 0
    return ["page", run, bundles[0], "--reference", reference, "-o", tmp_path / "page.html", "--backend", "ort-cpu"]


def test_a_page_shows_pictures_by_their_influence(
    page: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(*page, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    best, worst = (row["numbers"] for row in result["rows"][:2])
    assert len(best) == len(worst) == 16 and not set(best) & set(worst)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = sum(len(row["numbers"]) for row in result["rows"])
    assert text.count("data:image/jpeg;base64,") == shown and f"{result['fid']:.3f}" in text
    assert "src=" not in text.replace('src="data:image/jpeg;base64,', "")  # nothing is loaded from elsewhere


def test_without_the_worst_pictures_fid_falls(
    page: list[object], tiny_network: Path, reference: Path, tmp_path: Path
) -> None:
    """The order by influence is the order that FID has when pictures are left out."""
    from flexvar_evaluation.features import RunFeatures, load
    from flexvar_evaluation.reference import read_reference
    from flexvar_evaluation.scoring import influences_on_fid
    from flexvar_evaluation.statistics.frechet import frechet_distance
    from flexvar_evaluation.statistics.moments import moments_of

    features, real = (
        load(RunFeatures(tmp_path / "run", read_settings(tmp_path / "run"), False)),
        read_reference(reference),
    )
    order = np.argsort(influences_on_fid(features, real).values)

    def fid(rows: np.ndarray) -> float:
        return frechet_distance(moments_of([features.pool[np.sort(rows)]]), real.moments)

    assert fid(order[:-3]) < fid(order) < fid(order[3:])


def test_a_page_needs_the_bundle_of_the_run(
    page: list[object], tiny_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page[2] = tiny_bundle
    assert main(*page) == 2
    assert "The run was made with bundle" in capsys.readouterr().err and not (tmp_path / "page.html").exists()
