"""The memory that is available to this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..machine.control_groups import PROC, ControlGroup, control_groups


def available_bytes(proc: Path = PROC) -> int | None:
    """Bytes that this process can still take, or None if that is unknown.

    The kernel's estimate, limited by the control groups of the process.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return max(min([kernel, *_left_in_groups(proc)]), 0)


def _left_in_groups(proc: Path) -> Iterator[int]:
    """Bytes left in the control groups of this process, as far as they have a limit.

    File cache counts as left, although it is charged to a group: the kernel frees it when memory is needed.
    """
    for group in control_groups("memory", proc):
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            yield _left(group)


def _left(group: ControlGroup) -> int:
    rows = group.numbers("memory.stat")
    if group.version == 2:
        limit, used = int(group.read("memory.max")), int(group.read("memory.current"))
        return limit - used + rows.get("inactive_file", 0) + rows.get("active_file", 0)
    limit, used = int(group.read("memory.limit_in_bytes")), int(group.read("memory.usage_in_bytes"))
    limit = min(
        limit, rows.get("hierarchical_memory_limit", limit)
    )  # of the groups around it, which may not be mounted
    cache = rows.get("total_inactive_file", 0) + rows.get("total_active_file", 0)
    return limit - used + cache  # without a limit the number is huge
