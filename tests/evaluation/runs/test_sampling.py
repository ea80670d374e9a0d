"""Runs: every image is a pure function of its number, whoever makes it and however often it was interrupted."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexvar_evaluation import sample_command
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.runs import sampling
from flexvar_evaluation.runs.claims import claimed
from flexvar_evaluation.runs.settings import RunSettings, begin_or_resume, read_settings
from flexvar_evaluation.runs.shards import ShardFolder
from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.cli.main import main as command_line
from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed, InvalidInput

COUNT, SHARD = 23, 5
COMMON = [
    "--count",
    str(COUNT),
    "--shard-size",
    str(SHARD),
    "--schedule",
    "1_2_3",
    "--backend",
    "ort-cpu",
    "--threads",
    "1",
]


def main(arguments: list[str]) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        command_line(arguments)
    return int(ended.value.code or 0)


def flexvar(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tiny_bundle: Path, tiny_network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with features, pixels and PNG files. Read-only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    extra = ["--network", tiny_network, "--png", "--npz", folder.with_suffix(".npz")]
    assert flexvar("sample", tiny_bundle, "-o", folder, *COMMON, *extra) == 0
    return folder


@pytest.fixture
def command(tiny_bundle: Path, tiny_network: Path, tmp_path: Path) -> list[str]:
    """A command for a run in `tmp_path / "run"` that keeps features only."""
    start = ["evaluate", "sample", tiny_bundle, "-o", tmp_path / "run", "--network", tiny_network, *COMMON]
    return list(map(str, start))


def arrays(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    settings = read_settings(folder)
    names = ("pool", "spatial") if settings.features is not None else ()
    names += ("images",) if settings.pixels else ()
    stored = sampling.shard_folder(folder, settings)
    blocks = [stored.read(shard, names) for shard in stored.require_complete(partial=False)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in names}


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def test_an_image_is_a_function_of_its_number(run: Path, tiny_bundle: Path, tiny_network: Path) -> None:
    stored = arrays(run)
    with (
        FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe,
        FeatureNetwork.open(tiny_network) as net,
    ):
        for number in (0, 7, COUNT - 1):
            image = pipe([number % pipe.model.classes], "1_2_3", seed=0, first_index=number).images
            assert np.array_equal(stored["images"][number], image[0])
            assert np.array_equal(stored["pool"][number], net.features(image).pool[0])
    assert len(stored["pool"]) == len(stored["spatial"]) == len(stored["images"]) == COUNT


def test_png_and_npz_hold_the_same_pixels(run: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    images = arrays(run)["images"]
    with np.load(run.with_suffix(".npz")) as stored:
        assert list(stored) == ["arr_0"] and np.array_equal(stored["arr_0"], images)
    files = sorted((run / "images").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(COUNT)]
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, images, strict=True))
    made_again = ["generate", tiny_bundle, "--from", files[17], "-o", tmp_path / "again", "--backend", "ort-cpu"]
    assert main(list(map(str, made_again))) == 0
    [again] = (tmp_path / "again").iterdir()
    assert np.array_equal(np.asarray(Image.open(again)), images[17])


def test_a_finished_run_is_not_made_again(run: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    folder = Path(first["run"])
    before = shards(folder)
    assert main([*command, "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert (first["made"], second["made"]) == (COUNT, 0) and first["complete"] and second["complete"]
    assert first["hours_for_50000"] == pytest.approx(50_000 / first["images_per_second"] / 3600)
    assert shards(folder) == before and second["images_per_second"] is None


def test_the_batch_does_not_change_the_features_on_a_cpu(run: Path, command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--batch-size", "2"]) == 0
    assert all(np.array_equal(one, arrays(run)[name]) for name, one in arrays(tmp_path / "run").items())


def test_shares_make_the_run_together(
    run: Path, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One share by option, the other as torchrun says."""
    assert main([*command, "--shard", "1/2"]) == 0
    assert sorted(shards(tmp_path / "run")) == ["000001.npz", "000003.npz"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 0
    assert all(np.array_equal(one, arrays(run)[name]) for name, one in arrays(tmp_path / "run").items())


KILLED = """
import os, signal, sys
from flexvar_evaluation.runs.shards import ShardFolder
from flexvar_runtime.cli.main import main

write = ShardFolder.write

def killed(self, shard, arrays):
    if shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, shard, arrays)

ShardFolder.write = killed
main()
"""


def test_a_killed_process_loses_one_shard(command: list[str], tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, *command], check=False)
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / "run" / "shards"
    left = shards(tmp_path / "run")
    assert sorted(left) == ["000000.npz", "000001.npz", "000002.claim"]
    assert main(command) == 0
    resumed = shards(tmp_path / "run")
    assert {name: resumed[name] for name in left if name.endswith(".npz")}.items() <= left.items()
    shutil.rmtree(folder)
    assert main(command) == 0
    assert shards(tmp_path / "run") == resumed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--count", "24"], "--count"),
        (["--cfg", "1.25"], "--cfg"),
        (["--seed", "1"], "--seed"),
        (["--top-p", "0.5"], "--top-p"),
        (["--schedule", "1_3"], "--schedule"),
        (["--shard-size", "6"], "--shard-size"),
        (["--png"], "--png"),
        (["--npz", "x.npz"], "--npz"),
    ],
)
def test_other_settings_are_refused(
    command: list[str],
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--shard", "0/9"]) == 0
    before = shards(tmp_path / "run")
    assert main([*command, *options]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "was begun with other settings" in message and named in message
    assert shards(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("field", "value", "named"), [("batch", 32, "--batch-size"), ("device", "another GPU", "--device")]
)
def test_on_a_gpu_another_batch_or_gpu_is_refused(
    run: Path, tmp_path: Path, field: str, value: object, named: str
) -> None:
    settings: RunSettings = replace(read_settings(run), batch=64, device="a GPU")
    begin_or_resume(tmp_path, settings)
    begin_or_resume(tmp_path, settings)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000000.npz").touch()
    with pytest.raises(InvalidInput, match=named):
        begin_or_resume(tmp_path, replace(settings, **{field: value}))  # type: ignore[arg-type]


def test_a_foreign_folder_is_refused(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine", encoding="utf-8")
    assert main(command) == 2
    assert "has other files in it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_foreign_and_doubled_shards_are_named(
    run: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    folder = tmp_path / "run" / "shards"
    shutil.copy(folder / "000000.npz", folder / "000001.npz")
    assert main(command) == 5
    assert "000001.npz is a copy of shard 000000" in capsys.readouterr().err
    shutil.copy(run / "shards" / "000001.npz", folder / "000001.npz")
    assert main(command) == 5
    assert "000001.npz is a shard of another run" in capsys.readouterr().err


def test_free_space_is_checked_first(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sampling.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert main(command) == 4
    assert re.search(r"needs 0\.00 GiB, but its disk has 0\.00 GiB free", capsys.readouterr().err)
    assert not any((tmp_path / "run").iterdir())


def test_a_full_disk_leaves_no_half_shard(command: list[str], tmp_path: Path) -> None:
    """A limit on the size of a file stands for a full disk. The settings fit, but no shard does."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    pixels = [part for part in command if part != "--network"]
    pixels.remove(command[command.index("--network") + 1])
    process = subprocess.run(
        [sys.executable, "-c", "from flexvar_runtime.cli.main import main; main()", *pixels, "--schedule", "1_2_8"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 4, process.stderr
    assert "File too large" in process.stderr and "Traceback" not in process.stderr
    assert not list((tmp_path / "run" / "shards").iterdir())


def test_a_start_that_was_refused_does_not_hold_the_folder(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--count", "100000000", "--shard-size", "4000", "--png"]) == 4
    assert main(command) == 0


def test_two_processes_may_begin_at_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes its settings while this one looks at the folder."""
    settings, listed = read_settings(run), Path.iterdir

    def iterdir(self: Path) -> object:
        if self == tmp_path and not (tmp_path / "run.json").exists():
            shutil.copy(run / "run.json", tmp_path)
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    begin_or_resume(tmp_path, settings)
    assert read_settings(tmp_path) == settings


def test_one_process_writes_the_npz_file(run: Path, tmp_path: Path) -> None:
    settings, npz = read_settings(run), tmp_path / "x.npz"
    with claimed(tmp_path / ".x.npz.claim"):
        assert not sample_command._write_npz(npz, run, settings, force=False) and not npz.exists()
    assert sample_command._write_npz(npz, run, settings, force=False)
    assert not sample_command._write_npz(npz, run, settings, force=False)  # another process was faster
    assert npz.read_bytes() == run.with_suffix(".npz").read_bytes()


def test_another_shard_size_is_refused_as_a_setting(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the run has shards with numbers that the new size has not."""
    assert main(command) == 0
    assert main([*command, "--shard-size", "20"]) == 2
    assert "Its --shard-size gave 5, and now gives 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("class", 1), ("index", "1"), ("count", 0), ("count", 10**12), ("size", [0, 3]), ("extra", 1)]
)
def test_changed_settings_are_refused(run: Path, tmp_path: Path, key: str, value: object) -> None:
    data = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (data["image_0"] if key in data["image_0"] else data)[key] = value
    (tmp_path / "run.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtifactRefused, match=r"run\.json"):
        read_settings(tmp_path)


def test_neither_count_nor_preset(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flexvar("sample", tiny_bundle, "-o", tmp_path / "run") == 2
    assert "Neither --preset nor --count" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_preset_means_50000_images_and_its_settings(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardFolder, "has", lambda self, shard: True)  # so that nothing is made
    assert flexvar("sample", tiny_bundle, "-o", tmp_path / "run", "--preset", "sar-d16", "--backend", "ort-cpu") == 0
    settings = read_settings(tmp_path / "run")
    assert settings.count == 50_000 and settings.first.guidance.scale == 2.2 and settings.pixels
    assert [settings.label(number) for number in (0, 1, settings.classes)] == [0, 1, 0]


def test_space_counts_what_is_kept(run: Path, tmp_path: Path) -> None:
    settings = read_settings(run)
    height, width = settings.size
    pixels = height * width * 3
    assert settings.bytes_per_image() == 4 * 24 + pixels + (pixels + 4096)
    plenty: Callable[..., None] = sampling.require_space
    plenty(tmp_path, settings, COUNT)
    with pytest.raises(EnvironmentFailed, match="free"):
        sampling.require_space(tmp_path, settings, COUNT, 2**60)
