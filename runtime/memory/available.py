"""How much memory the machine has left for this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


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
