"""The memory that is available to this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..machine.control_groups import PROC, control_groups

NO_LIMIT = 2**60
"""Version 1 of control groups writes a number above this if there is no limit."""


@dataclass(frozen=True)
class _Files:
    """Names of the files of a memory group, and those of the rows of its statistics that count file cache."""

    limit: str
    used: str
    cache: tuple[str, str]


_FILES = {
    1: _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: _Files("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def available_bytes(proc: Path = PROC) -> int | None:
    """Bytes that this process can still take, or None if that is unknown.

    The kernel's estimate, limited by the control groups of the process and by its limit of address space (ulimit -v).
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
        kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return max(min([kernel, *_left_in_groups(proc), *_address_space_left(proc)]), 0)


def _address_space_left(proc: Path) -> Iterator[int]:
    with suppress(OSError, StopIteration, ValueError):  # no such file, or "unlimited"
        lines = (proc / "self/limits").read_text().splitlines()
        limit = int(next(line for line in lines if line.startswith("Max address space")).split()[3])
        sizes = (line.split() for line in (proc / "self/status").read_text().splitlines())
        yield limit - next(int(row[1]) * 1024 for row in sizes if row[0] == "VmSize:")


def _left_in_groups(proc: Path) -> Iterator[int]:
    """Bytes left in the control groups of this process, as far as they have a limit.

    File cache counts as left, although it is charged to a group: the kernel frees it when memory is needed.
    """
    for group in control_groups("memory", proc):
        files = _FILES[group.version]
        with suppress(OSError, ValueError):  # no such file, or "max": no limit
            limit = int(group.read(files.limit))
            if limit < NO_LIMIT:
                rows: dict[str, int] = {}
                with suppress(OSError, ValueError):  # then no cache is known
                    rows = group.numbers("memory.stat")
                yield limit - int(group.read(files.used)) + sum(rows.get(name, 0) for name in files.cache)
