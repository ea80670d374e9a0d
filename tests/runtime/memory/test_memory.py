"""The memory that is available to this process."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.memory.available import available_bytes

MIB = 2**20
NAMES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
UNLIMITED = {1: "9223372036854771712", 2: "max"}


def limit(group: Path, version: int, limit: str, current: int, cache: int = 0) -> None:
    half = cache * MIB // 2
    prefix = "total_" if version == 1 else ""
    group.joinpath(NAMES[version][0]).write_text(f"{limit}\n")
    group.joinpath(NAMES[version][1]).write_text(f"{current * MIB}\n")
    rows = f"anon 123\nfile {2 * half}\n{prefix}inactive_file {half}\n{prefix}active_file {half}\n"
    group.joinpath("memory.stat").write_text(rows)


def test_the_kernels_estimate(linux: Any) -> None:
    assert available_bytes(linux.proc) == 800 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_a_group(linux: Any, version: int) -> None:
    groups = linux.mount(version, "memory", "/work/job")
    limit(groups / "work" / "job", version, str(500 * MIB), current=200)
    assert available_bytes(linux.proc) == 300 * MIB
    limit(groups / "work", version, str(350 * MIB), current=200)  # the group around it is tighter
    assert available_bytes(linux.proc) == 150 * MIB
    limit(groups, version, UNLIMITED[version], current=1900)
    assert available_bytes(linux.proc) == 150 * MIB
    limit(groups / "work", version, str(350 * MIB), current=351)
    assert available_bytes(linux.proc) == 0


@pytest.mark.parametrize("version", [1, 2])
def test_file_cache_is_not_taken(linux: Any, version: int) -> None:
    """Checking the hashes of a bundle fills the group with file cache, which the kernel frees when needed."""
    groups = linux.mount(version, "memory", "/work")
    limit(groups / "work", version, str(500 * MIB), current=500, cache=400)
    assert available_bytes(linux.proc) == 400 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group", "shown"), [("/", "/"), ("/docker/ab", "/docker/ab"), ("/not/mounted", "/docker")])
def test_inside_a_container_the_group_is_the_root(linux: Any, version: int, group: str, shown: str) -> None:
    groups = linux.mount(version, "memory", group, shown)
    limit(groups, version, str(64 * MIB), current=4)
    assert available_bytes(linux.proc) == 60 * MIB


def test_both_versions_count(linux: Any) -> None:
    """Systems that move to version 2 mount both. A controller of version 1 has no limits in version 2."""
    limit(linux.mount(1, "memory", "/old") / "old", 1, str(70 * MIB), current=20)
    linux.mount(2, "memory", "/new")
    assert available_bytes(linux.proc) == 50 * MIB


def test_a_limit_of_address_space(linux: Any) -> None:
    (linux.proc / "self" / "status").write_text("Name:\tpython\nVmPeak:\t 999 kB\nVmSize:\t  204800 kB\n")
    limits = linux.proc / "self" / "limits"
    row = "Max address space         {:<20} unlimited            bytes\n"
    limits.write_text("Limit   Soft Limit   Hard Limit   Units\n" + row.format("unlimited"))
    assert available_bytes(linux.proc) == 800 * MIB
    limits.write_text(row.format(500 * MIB))
    assert available_bytes(linux.proc) == 300 * MIB


def test_unknown_where_the_system_does_not_say(tmp_path: Path, linux: Any) -> None:
    assert available_bytes(tmp_path / "nothing") is None
    (linux.proc / "meminfo").write_text("MemTotal: 5 kB\n")
    assert available_bytes(linux.proc) is None


def test_this_machine() -> None:
    left = available_bytes()
    assert left is None or left > 0


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="the system has no /proc/self/limits")
def test_the_address_space_of_a_real_process() -> None:
    code = "from flexvar_runtime.memory.available import available_bytes; print(available_bytes())"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=limited)
    assert 0 < int(done.stdout) < 2**30
