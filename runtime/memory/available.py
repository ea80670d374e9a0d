"""The memory that is available to this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still take, or None if that is unknown.

    The kernel's estimate, limited by the control groups (version 2) of the process.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return max(min([kernel, *_left_in_groups(proc, groups)]), 0)


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Bytes left in this process's control group and its parents, as far as they have a limit.

    File cache counts as left, although it is charged to a group: the kernel frees it when memory is needed.
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
