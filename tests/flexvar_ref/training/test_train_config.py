"""Configurations are read strictly, and the committed ones are valid."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flexvar_ref import TokenizerConfig
from flexvar_ref.training.config import Data, TokenizerRun, TransformerRun, VQLoss, build, load_config
from flexvar_ref.training.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_configurations_load(path: Path) -> None:
    kind = TokenizerRun if "tokenizer" in path.stem else TransformerRun
    assert load_config(path, kind).loop.steps > 0


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    run = TokenizerRun(data=Data(size=64), model=TokenizerConfig(multipliers=(1, 2)), loss=VQLoss(l2=0.5))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(run)), encoding="utf-8")
    assert load_config(path, TokenizerRun) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loop]\nstep = 3", "got unknown step in run.toml: loop; expected only steps, batch"),
        ("[training]\nsteps = 3", "got unknown training in run.toml; expected only data, model"),
        ("[loop]\nsteps = 3.5", "loop: steps = 3.5; expected a value of type int"),
        ("[loop]\nsteps = true", "steps = True; expected a value of type int"),
        ("[loop]\ncompile = 1", "compile = 1; expected a value of type bool"),
        ("[optim]\nbetas = [0.9]", "betas = [0.9]"),
        ("[optim]\nalgorithm = 'sgd'", "optim.algorithm = 'sgd'; expected one of adamw, muon"),
        ("[optim]\nmomentum = 1.0", "optim.momentum = 1.0; expected from 0, below 1"),
        ("[optim]\nlr = -1", "optim.lr = -1.0; expected a positive number"),
        ('[loop]\nprecision = "fp16"', "loop.precision = 'fp16'; expected one of fp32, bf16"),
        ("[loop]\nbatch = 0", "loop.batch = 0; expected at least 1"),
        ("[data]\nsize = 100", "data.size = 100; expected a multiple of the downsampling, 16"),
        ("[model]\ngroups = 7", "divisible by the groups"),
        ("[loss]\nperceptual = 1.0", "perceptual_weights = the file of a VGG-16"),
        ("[data]\nsize = 16\n[loss]\nadversarial = 0.1", "expected 0 for images below 32 pixels a side"),
        ("loop = 3", "loop = 3; expected a table of settings"),
        ("[loop", "expected a configuration in TOML or JSON"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path, TokenizerRun)
    assert message in str(refusal.value) and refusal.value.fix


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml", TransformerRun)


def test_whole_numbers_are_numbers_and_none_is_a_choice() -> None:
    run = build(TransformerRun, {"optim": {"lr": 1}, "model": {"drop_path": None, "depth": 2}}, "run")
    assert isinstance(run.optim.lr, float) and run.model.drop_path is None
