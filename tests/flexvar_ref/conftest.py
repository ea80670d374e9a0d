"""Fixtures of the tests of flexvar_ref."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import flexvar_ref
from flexvar_ref import FlexVAR, Tokenizer

Pair = tuple[FlexVAR, Tokenizer]


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    """A transformer of two blocks and a small tokenizer. Shared between tests: copy before changing."""
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture
def random_tokens() -> Callable[..., list[torch.Tensor]]:
    """(scales, batch, vocabulary, seed) -> random tokens (B, h, w) of every scale."""

    def make(scales: flexvar_ref.scales.Scales, batch: int, vocabulary: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocabulary, (batch, h, w), generator=generator) for h, w in scales]

    return make


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices are not faster with several threads, and much slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
