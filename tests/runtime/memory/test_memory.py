"""The memory that is available to this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexvar_runtime.memory.available import available_bytes

MIB = 2**20


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup: 800 MiB are available, and the process is in the group /work/job without limits."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:    2048000 kB\nMemFree:  1000 kB\nMemAvailable:   819200 kB\n")
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/work/job\n")
    (groups / "work" / "job").mkdir(parents=True)
    return proc, groups


def limit(group: Path, limit: str, current: int, cache: int) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current * MIB}\n")
    half = cache * MIB // 2
    (group / "memory.stat").write_text(f"anon 123\nfile {2 * half}\ninactive_file {half}\nactive_file {half}\n")


def test_the_kernels_estimate(system: tuple[Path, Path]) -> None:
    assert available_bytes(*system) == 800 * MIB


def test_a_limit_of_the_group(system: tuple[Path, Path]) -> None:
    proc, groups = system
    limit(groups / "work" / "job", str(500 * MIB), current=200, cache=0)
    assert available_bytes(proc, groups) == 300 * MIB
    limit(groups / "work", str(350 * MIB), current=200, cache=0)  # the group around it is tighter
    assert available_bytes(proc, groups) == 150 * MIB
    limit(groups, "max", current=1900, cache=0)
    assert available_bytes(proc, groups) == 150 * MIB
    limit(groups / "work", str(350 * MIB), current=351, cache=0)
    assert available_bytes(proc, groups) == 0


def test_file_cache_is_not_taken(system: tuple[Path, Path]) -> None:
    """Checking the hashes of a bundle fills the group with file cache, which the kernel frees when needed."""
    proc, groups = system
    limit(groups / "work" / "job", str(500 * MIB), current=500, cache=400)
    assert available_bytes(proc, groups) == 400 * MIB


def test_inside_a_container_the_group_is_the_root(system: tuple[Path, Path]) -> None:
    proc, groups = system
    limit(groups, str(64 * MIB), current=4, cache=0)
    for text in ("0::/\n", "0::/not/mounted/here\n", "5:memory:/v1\n"):
        (proc / "self" / "cgroup").write_text(text)
        assert available_bytes(proc, groups) == 60 * MIB


def test_unknown_where_the_system_does_not_say(tmp_path: Path, system: tuple[Path, Path]) -> None:
    assert available_bytes(tmp_path / "nothing", tmp_path / "nothing") is None
    (system[0] / "meminfo").write_text("MemTotal: 5 kB\n")
    assert available_bytes(*system) is None


def test_this_machine() -> None:
    left = available_bytes()
    assert left is None or left > 0
