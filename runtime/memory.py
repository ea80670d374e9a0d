"""How much memory is left, and how much a generation needs: refuse before the system has to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .errors import OutOfMemory
from .manifest import ModelFacts
from .schedule import ScaleSchedule

STEP_MAPS = 24  # maps of (new tokens, width) alive at once in the step graph on ort-cpu, measured
DECODER_MAPS = 6  # feature maps of the decoder alive at once at full size, measured with a margin
DECODER_CHANNELS = 128


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory this process may still take (the kernel's estimate, within control groups v2), else None."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return max(min([kernel, *_left_in_groups(proc, groups)]), 0)


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Bytes left in this process's control group and those around it, where they have a limit.

    File cache is charged to a group, a bundle's own weights among it, but freed when memory is asked for.
    """
    try:
        own = next(line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    group = groups / own.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(groups):
            return
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            rows = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
            yield limit - used + sum(int(size) for name, size in rows if name in ("inactive_file", "active_file"))


def loop_bytes(model: ModelFacts, schedule: ScaleSchedule, images: int, guided: bool, kv_itemsize: int) -> int:
    """Bytes of the scale loop: keys and values of all scales; logits, inputs and working memory of the largest."""
    sequences = images * (2 if guided else 1)
    kv = 2 * schedule.tokens * model.depth * sequences * model.width * kv_itemsize
    logits = images * schedule.largest * model.vocabulary * 4
    inputs = sequences * schedule.largest * (model.width + model.code_dim) * 4
    maps = STEP_MAPS * sequences * schedule.largest * model.width * 4
    attention = sequences * model.heads * schedule.largest * schedule.tokens * 4
    one_block = kv // model.depth  # the past and the new keys and values, joined
    return kv + logits + inputs + maps + attention + one_block


def decode_bytes(model: ModelFacts, size: tuple[int, int]) -> int:
    """Estimated working memory of decoding one (h, w) token map."""
    h, w = size
    return DECODER_MAPS * h * w * model.downsampling**2 * DECODER_CHANNELS * 4


def require(needed: int, available: int | None, what: str, fix: str) -> None:
    """Raise OutOfMemory where `needed` bytes are more than are left."""
    if available is not None and needed > available:
        raise OutOfMemory(
            f"{what} that needs {needed / 2**30:.1f} GiB", expected=f"at most {available / 2**30:.1f} GiB", fix=fix
        )
