"""Sizes: the published presets and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(("depth", "parameters", "adaln"), [(16, 315.6, 31.9), (20, 607.5, 32.4), (24, 1041.3, 32.6)])
def test_published_transformers(depth: int, parameters: float, adaln: float) -> None:
    config = TransformerConfig.published(depth)
    with torch.device("meta"):
        model = FlexVAR(config, torch.empty(config.vocabulary, config.code_dim))
    assert millions(model) == pytest.approx(parameters, abs=0.06)
    share = 100 * sum(millions(block.ada_lin) for block in model.blocks) / millions(model)
    assert share == pytest.approx(adaln, abs=0.06)
    assert (config.width, config.null_class, config.vocabulary) == (64 * depth, 1000, 8912)


def test_published_tokenizer() -> None:
    config = TokenizerConfig()
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    assert millions(tokenizer) == pytest.approx(72, abs=0.5)
    assert (config.downsampling, config.level_channels) == (16, (128, 128, 256, 256, 512))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, r"got depth 0; expected a whole number of at least 1; fix: "),
        ({"heads": 2.0}, r"got heads 2\.0; expected a whole number"),
        ({"classes": "10"}, r"got classes '10'; expected a whole number"),
        ({"drop_path": 1.0}, r"got drop_path 1\.0; expected a probability below 1; fix: "),
        ({"label_dropout": -0.1}, r"got label_dropout -0\.1; expected a probability"),
    ],
)
def test_impossible_transformers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"depth": 2, "heads": 2, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code_dim": 0}, r"got code_dim 0; expected a whole number"),
        ({"channels": 40}, r"got channels \(40, .*in 32 groups; expected .*; fix: "),
        ({"multipliers": ()}, r"got channels \(\) in 32 groups; expected .*; fix: "),
        ({"multipliers": (1, 0)}, r"got channels \(128, 0\) in 32 groups"),
    ],
)
def test_impossible_tokenizers_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**change)
