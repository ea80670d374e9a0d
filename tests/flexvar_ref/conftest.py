"""Networks the tests share: tiny ones for the laws, the published sizes for the recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import flexvar_ref
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

Pair = tuple[FlexVAR, Tokenizer]
BuildPair = Callable[[TransformerConfig, TokenizerConfig, int], Pair]


@pytest.fixture(scope="session")
def build_pair(tmp_path_factory: pytest.TempPathFactory) -> BuildPair:
    """Synthetic checkpoints written in the published layouts and loaded from there: the way users come."""

    def build(transformer: TransformerConfig, tokenizer: TokenizerConfig, seed: int) -> Pair:
        paths = write_checkpoints(tmp_path_factory.mktemp("checkpoints"), transformer, tokenizer, seed)
        pair = flexvar_ref.load(*paths)
        for path in paths:  # 290 MB each at the published sizes
            path.unlink()
        return pair

    return build


@pytest.fixture(scope="session")
def tiny(build_pair: BuildPair) -> Pair:
    """A transformer of two blocks and the second tokenizer. Shared: copy before changing."""
    return build_pair(tiny_transformer(), TINY_TOKENIZER, 0)


@pytest.fixture
def random_tokens() -> Callable[..., list[torch.Tensor]]:
    """Random tokens (B, h, w) of every scale."""

    def make(scales: flexvar_ref.scales.Scales, batch: int, vocabulary: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocabulary, (batch, h, w), generator=generator) for h, w in scales]

    return make


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads and lose minutes to them where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
