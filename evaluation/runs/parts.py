"""Which shards a process makes, if several processes or machines share the work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flexvar_runtime.checks import invalid

_SHARE = re.compile(r"([0-9]{1,6})/([0-9]{1,6})")
_LAUNCHERS = (  # variables of torchrun, and of srun, that hold the number of a process and how many there are
    ("torchrun", "RANK", ("WORLD_SIZE",), "LOCAL_RANK"),
    ("SLURM", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Share:
    """Share `number` of `count`: the shards whose number mod `count` is `number`. local: number on this machine."""

    number: int = 0
    count: int = 1
    local: int | None = None
    source: str = ""

    def has(self, shard: int) -> bool:
        return shard % self.count == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_share(text: str) -> Share:
    """ "2/8" as a share. Raises InvalidInput."""
    match = _SHARE.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise invalid(f"--shard is {text[:100]!r}", "i/n with i from 0 to n - 1", "Write it like 0/8.")
    return Share(int(match[1]), int(match[2]), source="--shard")


def share_of_launcher(environ: Mapping[str, str]) -> Share:
    """The share that torchrun or SLURM gave this process. Share 0/1 if neither started it."""
    for name, number, counts, local in _LAUNCHERS:
        rank = _whole(environ.get(number))
        world = next((found for found in (_whole(environ.get(count)) for count in counts) if found is not None), None)
        if rank is not None and world is not None and rank < world:
            return Share(rank, world, _whole(environ.get(local)), name)
    return Share()


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 10 else None
