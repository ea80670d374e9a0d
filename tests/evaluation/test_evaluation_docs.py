"""Every command of docs/evaluation.md is run, on small files of the same names. Its tables are those of the code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from graphdef_file import tiny

from flexvar_evaluation.commands import register
from flexvar_evaluation.runs import starting
from flexvar_evaluation.runs.claims import SECONDS_KEPT
from flexvar_evaluation.runs.settings import read_settings
from flexvar_evaluation.sample_command import PUBLISHED_COUNT
from flexvar_runtime.cli.main import main as command_line
from flexvar_runtime.model.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```bash\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SMALLER = {"--preset flexvar-d16": "--preset flexvar-d16 --count 24", "--count 5000": "--count 8", "6,8,10,13": "6,8"}
"""What is replaced in the commands, because 50,000 images take hours."""


@pytest.fixture
def desk(ordered_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the downloads, and with the bundles that `flexvar export` would make."""
    schedule = "1_2_3_4_5_6_8_10_13_16"
    for name in ("d16.bundle", "d16-fp16.bundle"):
        shutil.copytree(ordered_bundle(schedule, [schedule]), tmp_path / name)
    tiny().write(tmp_path / "classify_image_graph_def.pb")
    rng = np.random.default_rng(0)
    for name in ("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz"):
        np.savez(tmp_path / name, rng.integers(0, 256, (12, 32, 32, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_its_commands_run(desk: Path) -> None:
    ran = []
    for text in BLOCK.findall(PAGE):
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        for line in text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            assert program == "flexvar"
            if words[0] == "export":  # test_readme.py runs it
                continue
            with pytest.raises(SystemExit) as ended:
                command_line(words)
            assert not ended.value.code, line
            ran.append(words[1])
    assert set(ran) == {"import", "reference", "sample", "score", "sweep", "page"}
    assert len(json.loads((desk / "sweep" / "sweep.json").read_text())["points"]) == 12
    assert read_settings(desk / "d16-run").first.guidance == PRESETS["flexvar-d16"].guidance
    assert (desk / "d16.html").stat().st_size > 10_000


def test_the_readme_names_the_same_command_and_row() -> None:
    [command] = re.findall(r"^flexvar evaluate score admnet.*$", README, flags=re.MULTILINE)
    assert command in PAGE
    row = ("3.94", "6.14", "215.8", "0.8265", "0.5309")
    assert " / ".join(row) in README and all(metric in PAGE for metric in row)
    for text in (README, PAGE):
        assert "compatible with OpenAI's evaluator; never run on its real network file here" in " ".join(text.split())


def test_its_table_of_published_figures_is_made_from_the_presets() -> None:
    lines = ["| preset | checkpoint | steps | FID | IS | measured here |", "|---|---|---|---|---|---|"]
    for name, one in PRESETS.items():
        score = "not known" if one.inception_score is None else one.inception_score
        lines.append(f"| `{name}` | `{one.weights}` | {len(one.schedule)} | {one.fid} | {score} | not measured |")
    assert "\n".join(lines) in PAGE


def test_it_names_every_option_of_sample_and_the_defaults() -> None:
    app = typer.Typer()
    register(app)
    sample = typer.main.get_command(app).commands["evaluate"].commands["sample"]  # type: ignore[attr-defined]
    elsewhere = {"--output", "--backend", "--device", "--engines", "--threads", "--allow-unproved", "--force", "--json"}
    for parameter in sample.params:
        name = parameter.opts[-1]
        assert name in PAGE or name in elsewhere or not name.startswith("--"), name
    assert f"| {starting.GPU_BATCH} on a GPU, else {starting.CPU_BATCH} |" in PAGE
    assert f"images in a file (a shard) | {starting.SHARD_SIZE} |" in PAGE
    assert f"| {PUBLISHED_COUNT} with `--preset` |" in PAGE
    assert f"after {SECONDS_KEPT / 60:.0f} minutes" in PAGE


@pytest.mark.parametrize(("features", "pixels", "size"), [(0.8, 9.8, 256), (0.8, 39.3, 512)])
def test_its_disk_space_is_computed(features: float, pixels: float, size: int) -> None:
    assert round(PUBLISHED_COUNT * 4 * (2048 + 2023) / 1e9, 1) == features
    assert round(PUBLISHED_COUNT * 3 * size**2 / 1e9, 1) == pixels and f"{pixels} GB" in PAGE
