"""What an edit keeps, in NumPy as in the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexvar_ref
from flexvar_ref import editing
from flexvar_runtime import ScaleSchedule
from flexvar_runtime.bundle.opening import Bundle
from flexvar_runtime.editing.given import keep_maps, masked, refined
from flexvar_runtime.model.signatures import TABLES_FILE
from flexvar_runtime.model.tables import Tables
from flexvar_runtime.request import Given

sides = st.integers(1, 9)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: tuple[Path, Path]) -> flexvar_ref.Tokenizer:
    return flexvar_ref.load(*tiny_checkpoint)[1]


@pytest.fixture(scope="module")
def tables(tiny_bundle: Path) -> Tables:
    bundle = Bundle.open(tiny_bundle)
    return Tables.load(bundle.file(TABLES_FILE), bundle.manifest.model)


@settings(deadline=None, max_examples=60)
@given(
    later=st.lists(st.tuples(sides, sides), min_size=1, max_size=4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.sampled_from([0.02, 0.5, 0.98]),
    seed=st.integers(0, 2**32 - 1),
)
def test_kept_tokens_are_those_of_the_reference(
    later: list[tuple[int, int]], height: int, width: int, share: float, seed: int
) -> None:
    mask = np.random.default_rng(seed).random((2, height, width)) < share
    schedule = ScaleSchedule.parse([1, *later])
    ours, theirs = keep_maps(mask, schedule), editing.keep_maps(torch.from_numpy(mask), tuple(schedule))
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == np.bool_ and np.array_equal(one, two.numpy())


def test_tokens_are_those_of_the_reference(tokenizer: flexvar_ref.Tokenizer, tables: Tables) -> None:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((2, tables.codebook.shape[1], 6, 8)).astype(np.float32)
    factor, schedule = tokenizer.config.downsampling, ScaleSchedule.parse("1_2_3x4_6x8")
    mask = np.zeros((2, 6 * factor, 8 * factor), bool)
    mask[0, factor // 2 : 3 * factor, : 5 * factor + 1] = True
    mask[1, -1, -1] = True
    for ours, theirs in (
        (
            masked(tables, latent, mask, schedule).tokens,
            editing.masked_tokens(tokenizer, torch.from_numpy(latent), torch.from_numpy(mask), tuple(schedule)),
        ),
        (refined(tables, latent, schedule, 2).tokens, tokenizer.quantize(torch.from_numpy(latent), tuple(schedule))),
    ):
        for one, two in zip(ours, theirs, strict=True):
            assert one.dtype == np.int32 and np.array_equal(one, two.numpy())


def test_forced_scales_and_tokens_put_back() -> None:
    tokens = tuple(np.full((1, side, side), side, np.int32) for side in (1, 2, 3))
    keep = [np.ones((1, side, side), bool) for side in (1, 2, 3)]
    assert Given(tokens, tuple(keep)).forced == 3
    keep[1][0, 0, 1] = False
    given = Given(tokens, tuple(keep))
    assert given.forced == 1
    drawn = np.full((1, 2, 2), 7, np.int32)
    assert given.put_back(1, drawn).tolist() == [[[2, 7], [2, 2]]] and given.put_back(1, drawn).dtype == np.int32
    keep[2][:] = False
    assert given.put_back(2, tokens[2]) is tokens[2]
