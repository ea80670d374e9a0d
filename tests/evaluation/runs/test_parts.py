"""Shares of the work: by option, torchrun and SLURM."""

from __future__ import annotations

import pytest

from flexvar_evaluation.runs.parts import Share, parse_share, share_of_launcher
from flexvar_runtime.errors import InvalidInput


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_shard_belongs_to_one_share(count: int) -> None:
    shares = [parse_share(f"{number}/{count}") for number in range(count)]
    assert all(sum(share.has(shard) for share in shares) == 1 for shard in range(50))


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/3", "0/0", "a/b", "1/2/3", "0x1/3", "٣/٤"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--shard"):
        parse_share(text)


def test_launchers() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert share_of_launcher(torchrun) == Share(3, 8, 1, "torchrun")
    assert share_of_launcher(slurm) == Share(2, 4, 0, "SLURM")
    assert share_of_launcher({**slurm, "SLURM_STEP_NUM_TASKS": "3"}).count == 3
    assert share_of_launcher({**slurm, **torchrun}).source == "torchrun"
    for others in ({}, {"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        assert share_of_launcher(others) == Share()
