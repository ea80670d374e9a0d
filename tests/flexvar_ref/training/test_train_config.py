"""Configurations are read strictly, and the files in configs/ are valid."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flexvar_ref import TokenizerConfig
from flexvar_ref.errors import ConfigError
from flexvar_ref.training.config import Data, TokenizerRun, TransformerRun, VQLoss, build, load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_committed_configurations_load() -> None:
    paths = sorted(CONFIGS.glob("*.toml"))
    assert len(paths) >= 4
    for path in paths:
        kind = TokenizerRun if "tokenizer" in path.stem else TransformerRun
        assert load_config(path, kind).loop.steps > 0, path


def test_a_written_configuration_is_read_back(tmp_path: Path) -> None:
    run = TokenizerRun(data=Data(size=64), model=TokenizerConfig(multipliers=(1, 2)), loss=VQLoss(l2=0.5))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(run)), encoding="utf-8")
    assert load_config(path, TokenizerRun) == run


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[loop]\nstep = 3", "step. The settings are steps, "),
        ("[training]\nsteps = 3", "training. The settings are data, "),
        ("[loop]\nsteps = 3.5", "steps is 3.5"),
        ("[loop]\nsteps = true", "steps is True"),
        ("[loop]\ncompile = 1", "compile is 1"),
        ("[optim]\nbetas = [0.9]", "betas is [0.9]"),
        ("[optim]\nalgorithm = 'sgd'", "optim.algorithm is 'sgd'"),
        ("[optim]\nmomentum = 1.0", "optim.momentum is 1.0"),
        ("[optim]\nlr = -1", "optim.lr is -1.0"),
        ('[loop]\nprecision = "fp16"', "loop.precision is 'fp16'"),
        ("[loop]\nbatch = 0", "loop.batch is 0"),
        ("[data]\nsize = 100", "data.size is 100"),
        ("[model]\ngroups = 7", "groups (7)"),
        ("[loss]\nperceptual = 1.0", "loss.perceptual_weights"),
        ("[data]\nsize = 16\n[loss]\nadversarial = 0.1", "loss.adversarial is 0.1"),
        ("loop = 3", "loop is 3"),
        ("[loop", "run.toml"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, TokenizerRun)
    assert fault in caught.value.got and caught.value.expected and caught.value.fix


DEEP = 100_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", "[" * DEEP),
        ("deep_objects.json", '{"loop":' * DEEP),
        ("deep_setting.json", '{"loop": {"steps": ' + "[" * 900 + "]" * 900 + "}}"),
        ("twice.json", '{"loop": {"steps": 1, "steps": 2}}'),
        ("nan.json", '{"optim": {"lr": NaN}}'),
        ("digits.json", '{"loop": {"steps": ' + "9" * 5000 + "}}"),
        ("bytes.json", b"\xff\xfe{}"),
        ("deep.toml", "loop = " + "[" * 20_000),
        ("deep_tables.toml", "loop = " + "{a = " * 5_000),
        ("long_key.toml", "a" + ".a" * DEEP + " = 1"),
        ("dotted.toml", "loop.steps" + ".a" * 1_000 + " = 1"),
        ("hexadecimal.toml", "[loop]\nsteps = 0x" + "f" * 20_000),
        ("digits.toml", "[loop]\nsteps = " + "9" * 5000),
        ("bytes.toml", b"\xff\xd8\xff\xe0 JFIF"),
        ("long.toml", " " * (2 << 20)),
        ("workers.toml", "[data]\nworkers = 1000000000"),
        ("blocks.toml", "[model]\ndecoder_blocks = 1000000000"),
        ("float.toml", "[optim]\nlr = 0x" + "f" * 1000),
    ],
)
def test_files_of_absurd_content_are_refused(tmp_path: Path, name: str, text: str | bytes) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name, TokenizerRun)
    assert name in caught.value.got or "data.workers" in caught.value.got
    assert len(caught.value.got) < 1000 and caught.value.fix


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml", TransformerRun)


def test_integers_become_floats_and_none_is_allowed() -> None:
    run = build(TransformerRun, {"optim": {"lr": 1}, "model": {"drop_path": None, "depth": 2}}, "run")
    assert isinstance(run.optim.lr, float) and run.model.drop_path is None
