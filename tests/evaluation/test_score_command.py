"""`flexvar evaluate reference` and `score`: the same pictures give the same metrics, wherever they come from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_network import write_tiny_network

from flexvar_evaluation.features import RunFeatures, load
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.reference import read_reference, write_reference
from flexvar_evaluation.runs.settings import read_settings
from flexvar_evaluation.score_command import print_table
from flexvar_evaluation.scoring import Metrics
from flexvar_evaluation.statistics.frechet import frechet_distance
from flexvar_evaluation.statistics.intervals import Interval
from flexvar_evaluation.statistics.moments import moments_of
from flexvar_runtime.cli.main import main as command_line

COUNT = 24
COMMON = ["--count", COUNT, "--shard-size", 7, "--schedule", "1_2_3", "--backend", "ort-cpu", "--threads", 1]
KEYS = {
    *[
        "images",
        "fid",
        "fid_interval",
        "fid_infinity",
        "fid_infinity_interval",
        "sfid",
        "inception_score",
        "precision",
        "recall",
        "precision_float32",
    ],
    *["recall_float32", "recognised"],
}


def main(*arguments: object) -> int:
    """The exit code of a command of `flexvar evaluate`."""
    with pytest.raises(SystemExit) as ended:
        command_line(["evaluate", *map(str, arguments)])
    return int(ended.value.code or 0)


class Made:
    """Runs, pictures and a reference of the tiny model."""

    def __init__(self, folder: Path, bundle: Path, network: Path) -> None:
        self.folder, self.network = folder, network
        self.run, self.pixels, self.npz = folder / "run", folder / "pixels", folder / "pictures.npz"
        self.png, self.reference = folder / "png" / "images", folder / "real.ref"
        assert main("sample", bundle, "-o", self.run, "--network", network, *COMMON) == 0
        assert main("sample", bundle, "-o", self.pixels, "--npz", self.npz, *COMMON) == 0
        assert main("sample", bundle, "-o", folder / "png", "--png", *COMMON) == 0
        assert main("sample", bundle, "-o", folder / "other", "--network", network, *COMMON, "--cfg", "2.4") == 0
        real = np.random.default_rng(3).integers(0, 256, (30, 6, 6, 3), np.uint8)
        np.savez(folder / "real.npz", real)
        assert main("reference", folder / "real.npz", "--network", network, "-o", self.reference) == 0


@pytest.fixture(scope="module")
def made(tiny_bundle: Path, tiny_network: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("score"), tiny_bundle, tiny_network)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_table_is_complete_in_a_narrow_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    fid = Interval(112.345, 111.234, 113.456)
    metrics = Metrics(
        images=50_000,
        fid=fid,
        fid_infinity=None,
        sfid=142.456,
        inception_score=215.84,
        precision=0.8265,
        recall=0.5309,
        precision_float32=0.8,
        recall_float32=0.5,
        recognised=0.9365,
    )
    names = ["admnet_guided_upsampled_imagenet256.npz", "d16-fp16_10steps_cfg2.5"]
    print_table([(name, metrics) for name in names])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    cells = ["50,000", "112.345", "111.234 to 113.456", "142.456", "215.84", "0.8265", "0.5309", "93.65%"]
    assert len(lines) == 3
    assert all(line.split("  ")[0].strip() == name for line, name in zip(lines[1:], names, strict=True))
    assert all(cell in line for line in lines[1:] for cell in cells)


@pytest.fixture
def score(made: Made, capsys: pytest.CaptureFixture[str]) -> Any:
    """(images, options) -> the metrics as JSON."""

    def scored(images: Path, *options: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main("score", images, "--reference", made.reference, *options, "--json") == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return scored


def test_the_same_pictures_have_the_same_figures(made: Made, score: Any) -> None:
    metrics = score(made.run)
    assert metrics.keys() >= KEYS and metrics["images"] == COUNT
    for images in (made.pixels, made.npz, made.png):
        found = score(images, "--network", made.network)
        same = {"fid", "sfid", "inception_score", "precision", "recall", "precision_float32", "recall_float32"}
        assert {key: found[key] for key in same} == {key: metrics[key] for key in same}
    low, high = metrics["fid_interval"]
    assert low < metrics["fid"] < high


def test_fid_is_that_of_the_features(made: Made, score: Any) -> None:
    features = load(RunFeatures(made.run, read_settings(made.run), partial=False))
    with FeatureNetwork.open(made.network) as network, np.load(made.folder / "real.npz") as real:
        expected = network.features(real["arr_0"])
    own = np.cov(features.pool, rowvar=False), np.cov(expected.pool, rowvar=False)
    means = features.pool.mean(0, np.float64) - expected.pool.mean(0, np.float64)
    roots = np.sqrt(np.linalg.eigvals(own[0] @ own[1]).real.clip(0)).sum()
    assert score(made.run)["fid"] == pytest.approx(means @ means + np.trace(own[0] + own[1]) - 2 * roots, rel=1e-6)
    assert expected.spatial is not None and features.spatial is not None
    assert score(made.run)["sfid"] == pytest.approx(
        frechet_distance(features.spatial, moments_of([expected.spatial])), rel=1e-9
    )


def test_moments_that_the_file_stores_are_used(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = read_reference(made.reference)
    assert plain.spatial is not None and not plain.facts.stored and plain.facts.difference is None
    with np.load(made.folder / "real.npz") as real:
        stored = {"mu": plain.moments.mean + 1e-3, "sigma": plain.moments.covariance * 1.01}
        spatial = {"mu_s": plain.spatial.mean, "sigma_s": plain.spatial.covariance}
        np.savez(tmp_path / "virtual.npz", real["arr_0"], **stored, **spatial)
        np.savez(tmp_path / "other.npz", real["arr_0"], mu=np.zeros(3), sigma=np.zeros((3, 3)))
    command = ("--network", made.network, "-o")
    assert main("reference", tmp_path / "virtual.npz", *command, tmp_path / "virtual.ref") == 0
    assert "the stored moments differ from those of the pictures: 0.001 in a mean" in capsys.readouterr().out
    found = read_reference(tmp_path / "virtual.ref")
    assert found.facts.stored and found.facts.difference is not None and found.facts.spatial_difference is not None
    assert np.array_equal(found.moments.mean, stored["mu"]) and np.array_equal(
        found.moments.covariance, stored["sigma"]
    )
    assert found.facts.difference.mean == pytest.approx(1e-3) and found.facts.spatial_difference.frechet < 1e-6
    assert np.array_equal(found.pool, plain.pool) and np.array_equal(found.radii_half, plain.radii_half)
    assert main("reference", tmp_path / "other.npz", *command, tmp_path / "other.ref") == 5
    assert "mu is float64 (3,), but it must be" in capsys.readouterr().err
    assert not (tmp_path / "other.ref").exists()


def test_two_runs_are_compared_image_by_image(made: Made, score: Any) -> None:
    found = score(made.folder / "other", "--against", made.run)["against"]
    difference = score(made.folder / "other")["fid"] - score(made.run)["fid"]
    assert found["difference"] == pytest.approx(difference) and found["images"] == COUNT
    low, high = found["interval"]
    assert low < difference < high and high - low < found["unpaired_width"]
    alike = score(made.run, "--against", made.run)["against"]
    assert alike["difference"] == 0 and not alike["significant"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{npz}"], 2, "Pass --network"),
        (["{pixels}"], 2, "Pass --network"),
        (["{npz}", "--network", "{network}", "--against", "{run}"], 2, "is not a run"),
        (["{folder}/nothing", "--network", "{network}"], 2, "There is no file or directory"),
        (["{reference}", "--network", "{network}"], 5, "has no array arr_0"),
        (["{run}", "--network", "{network}"], 2, "--network is not used"),
        (["{run}", "--threads", "2"], 2, "--threads is not used"),
        (["{run}", "--against", "{run}", "--partial"], 2, "--against cannot be combined with --partial"),
    ],
)
def test_refusals(
    made: Made, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: str(value) for name, value in vars(made).items()}
    assert main("score", *(part.format(**names) for part in arguments), "--reference", made.reference) == code
    assert message in capsys.readouterr().err


def test_features_of_another_network_are_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_network(tmp_path / "other.onnx", seed=1)
    assert main("reference", made.folder / "real.npz", "--network", other, "-o", tmp_path / "other.ref") == 0
    assert main("score", made.run, "--reference", tmp_path / "other.ref") == 2
    assert "The features come from the network tiny (" in capsys.readouterr().err


def test_a_network_with_other_weights_is_another_one(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if its file claims the same origin."""
    content = bytearray(made.network.read_bytes())
    first = np.float32(np.random.default_rng(0).standard_normal() / 7 / 64).tobytes()  # of the kernel
    content[content.index(first)] ^= 1
    (tmp_path / "tiny.onnx").write_bytes(bytes(content))
    assert main("score", made.npz, "--reference", made.reference, "--network", tmp_path / "tiny.onnx") == 2
    assert "The features come from the network tiny (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool", np.nan),
        ("mean", np.inf),
        ("covariance", np.nan),
        ("covariance", -1.0),
        ("radii_half", -1.0),
        ("radii_float32", np.nan),
        ("head_weights", np.inf),
        ("spatial_mean", np.nan),
        ("spatial_covariance", -9.0),
    ],
)
def test_a_reference_with_impossible_values_is_refused(
    made: Made, tmp_path: Path, name: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(made.reference) as stored:
        arrays = dict(stored)
    arrays[name][(0,) * arrays[name].ndim] = value
    np.savez(tmp_path / "bad.npz", **arrays)
    assert main("score", made.run, "--reference", tmp_path / "bad.npz") == 5
    assert f"its array {name}" in capsys.readouterr().err


def test_the_source_is_not_replaced(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    source = made.folder / "real.npz"
    before = source.read_bytes()
    assert main("reference", source, "--network", made.network, "-o", source, "--force") == 2
    assert main("import", made.network, "-o", made.network, "--force") == 2
    assert "is the file that is read" in capsys.readouterr().err and source.read_bytes() == before


def test_a_missing_shard_is_refused_without_partial(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    (run / "shards" / "000001.npz").unlink()
    assert main("score", run, "--reference", made.reference) == 2
    assert "7 of 24 images are missing" in capsys.readouterr().err
    assert main("score", run, "--reference", made.reference, "--partial", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 17


def test_a_missing_picture_of_a_run_is_refused_without_partial(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(made.png.parent, tmp_path / "run"))
    (run / "images" / f"{COUNT - 1:06d}.png").unlink()
    command = ("score", run / "images", "--reference", made.reference, "--network", made.network)
    assert main(*command) == 2
    assert re.search(r"23 pictures .* 23 is missing", capsys.readouterr().err)
    assert main(*command, "--partial", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == COUNT - 1


def test_a_stopped_score_continues_with_its_features(
    made: Made, score: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexvar_evaluation.features.SHARD_SIZE", 10)
    options = ("--network", made.network, "--work", tmp_path / "work")
    computed, original = list[int](), FeatureNetwork.features

    def stopping(self: FeatureNetwork, images: Any) -> Any:
        if len(images) > 1:  # one image asks for the number of features
            computed.append(len(images))
            if len(computed) == 3:
                raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(FeatureNetwork, "features", stopping)
    assert main("score", made.npz, "--reference", made.reference, *options) == 130
    [folder] = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == ["000000.npz", "000001.npz"]
    assert score(made.npz, *options)["fid"] == score(made.run)["fid"]
    assert computed == [10, 10, 4, 4]
    assert score(made.folder / "real.npz", *options)["fid"] < 1e-6
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("cut", [0, 100, 2000, -50])
def test_a_cut_reference_is_refused(made: Made, tmp_path: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.ref").write_bytes(made.reference.read_bytes()[:cut])
    assert main("score", made.run, "--reference", tmp_path / "cut.ref") == 5
    assert "cut.ref" in capsys.readouterr().err


def test_a_reference_comes_back_as_it_was(made: Made, tmp_path: Path) -> None:
    one = read_reference(made.reference)
    write_reference(tmp_path / "copy.ref", one)
    assert (tmp_path / "copy.ref").read_bytes() == made.reference.read_bytes()
    assert one.head is not None and one.head.bias is None and one.facts.images == 30
