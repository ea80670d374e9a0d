"""Shards: complete or absent, and each file says which one it is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from flexvar_evaluation.runs.shards import ShardFolder, Sharding
from flexvar_runtime.errors import ArtifactRefused, InvalidInput

WORK = "a" * 64
ARRAYS = {"pool": ("float32", (1,)), "spatial": ("float32", (1,))}


@pytest.fixture
def shards(tmp_path: Path) -> ShardFolder:
    """10 images in shards of 4, all of them written."""
    folder = ShardFolder(tmp_path / "shards", WORK, Sharding(10, 4), ARRAYS)
    folder.folder.mkdir()
    for shard in range(3):
        numbers = folder.sharding.images(shard)
        folder.write(shard, {"pool": np.array(numbers, np.float32)[:, None]})
    return folder


def test_all_images_come_back_in_order(shards: ShardFolder) -> None:
    rows = [shards.read(shard, ("pool",))["pool"][:, 0] for shard in shards.require_complete(partial=False)]
    assert np.concatenate(rows).tolist() == list(range(10)) and [len(row) for row in rows] == [4, 4, 2]


def test_writing_twice_changes_nothing(shards: ShardFolder) -> None:
    before = shards.path(1).read_bytes()
    shards.write(1, {"pool": np.arange(4, 8, dtype=np.float32)[:, None]})
    assert shards.path(1).read_bytes() == before


def test_missing_shards_are_named(shards: ShardFolder) -> None:
    shards.path(1).unlink()
    with pytest.raises(InvalidInput, match=re.escape("4 of 10 images are missing")) as caught:
        shards.require_complete(partial=False)
    assert "000001.npz" in str(caught.value) and "--partial" in caught.value.fix
    assert shards.require_complete(partial=True) == [0, 2] and shards.missing() == [1]


def test_a_doubled_shard_is_named(shards: ShardFolder) -> None:
    shutil.copy(shards.path(0), shards.path(1))
    with pytest.raises(ArtifactRefused, match=r"000001\.npz is a copy of shard 000000"):
        shards.check(1)


def test_a_shard_of_another_run_is_named(shards: ShardFolder, tmp_path: Path) -> None:
    other = ShardFolder(tmp_path / "other", "b" * 64, shards.sharding, ARRAYS)
    other.folder.mkdir()
    other.write(2, {"pool": np.zeros((2, 1), np.float32)})
    shutil.copy(other.path(2), shards.path(2))
    with pytest.raises(ArtifactRefused, match=r"000002\.npz is a shard of another run"):
        shards.read(2, ("pool",))


def test_a_shard_of_other_sizes_is_named(shards: ShardFolder) -> None:
    other = ShardFolder(shards.folder, WORK, Sharding(11, 4), ARRAYS)
    with pytest.raises(ArtifactRefused, match=r"has 2 images from 8, not 3 from 8"):
        other.check(2)


@pytest.mark.parametrize("name", ["000003.npz", "000001.npy", "notes.txt", "1.npz"])
def test_a_foreign_file_is_named(shards: ShardFolder, name: str) -> None:
    (shards.folder / name).write_bytes(b"")
    with pytest.raises(ArtifactRefused, match=re.escape(name)):
        shards.done()


def test_more_shards_than_names_are_refused() -> None:
    Sharding(10**6, 1).check()
    with pytest.raises(InvalidInput, match="--shard-size"):
        Sharding(10**6 + 1, 1).check()


def test_claims_and_hidden_files_are_no_foreign_files(shards: ShardFolder) -> None:
    for name in ("000001.claim", ".000001.npz.partial-1-abcdef012345.npz"):
        (shards.folder / name).write_bytes(b"")
    assert shards.done() == [0, 1, 2]


@pytest.mark.parametrize("cut", [0, 10, 200, -1])
def test_a_cut_shard_is_refused(shards: ShardFolder, cut: int) -> None:
    content = shards.path(0).read_bytes()
    shards.path(0).write_bytes(content[:cut])
    with pytest.raises(ArtifactRefused, match=r"000000\.npz"):
        shards.read(0, ("pool",))


def test_a_changed_byte_is_refused(shards: ShardFolder) -> None:
    content = bytearray(shards.path(0).read_bytes())
    at = content.rindex(np.float32(3).tobytes())
    content[at] ^= 1
    shards.path(0).write_bytes(bytes(content))
    with pytest.raises(ArtifactRefused, match=r"000000\.npz"):
        shards.read(0, ("pool",))


def test_other_arrays_are_refused(shards: ShardFolder) -> None:
    for wrong in (
        np.zeros((3, 1), np.float32),
        np.zeros((4, 2), np.float32),
        np.zeros(4, np.float32),
        np.zeros((4, 1)),
    ):
        shards.write(0, {"pool": wrong})
        with pytest.raises(ArtifactRefused, match=r"it must be float32 \(4, 1\)"):
            shards.read(0, ("pool",))
    with pytest.raises(ArtifactRefused, match="spatial is missing"):
        shards.read(1, ("spatial",))
