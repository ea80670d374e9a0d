"""Sizes: the published presets, and values that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_ref.errors import InvalidInput


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
    ("change", "fault"),
    [
        ({"depth": 0}, "depth is 0"),
        ({"heads": 2.0}, "heads is 2.0"),
        ({"classes": "10"}, "classes is '10'"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
    ],
)
def test_impossible_transformers_are_refused(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        TransformerConfig(**{"depth": 2, "heads": 2, **change})
    assert fault in caught.value.got


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"code_dim": 0}, ["code_dim"]),
        ({"channels": 40}, ["(40, ", "groups", "32"]),
        ({"multipliers": ()}, ["()"]),
        ({"multipliers": (1, 0)}, ["(1, 0)"]),
    ],
)
def test_impossible_tokenizers_are_refused(change: dict[str, Any], faults: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        TokenizerConfig(**change)
    assert all(fault in caught.value.got for fault in faults)
