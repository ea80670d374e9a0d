"""The default number of threads: the affinity mask, the quotas of control groups, and OMP_NUM_THREADS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.machine.control_groups import control_groups
from flexvar_runtime.machine.processors import default_threads


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write_quota(group: Path, version: int, quota: str, period: str = "100000") -> None:
    if version == 2:
        (group / "cpu.max").write_text(f"{quota} {period}\n")
        return
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text(f"{period}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quota", "period", "threads"),
    [
        ("100000", "100000", 1),
        ("50000", "100000", 1),  # half a processor
        ("150000", "100000", 2),  # rounded up: one thread would leave a third of it unused
        ("300000", "100000", 3),
        ("75000", "25000", 3),
        ("3200000", "100000", 8),  # more than there are
    ],
)
def test_a_quota(linux: Any, version: int, quota: str, period: str, threads: int) -> None:
    groups = linux.mount(version, "cpu", "/docker/ab")
    write_quota(groups / "docker" / "ab", version, quota, period)
    assert default_threads({}, linux.proc) == threads


@pytest.mark.parametrize(
    "line", ["", "odd", "36 35 0:30 / /x rw - cgroup", "36 35 / - tmpfs tmpfs rw", "1 - 2 - 3 - 4"]
)
def test_lines_of_proc_that_nobody_knows(linux: Any, line: str) -> None:
    write_quota(linux.mount(1, "cpu", "/docker/ab") / "docker" / "ab", 1, "200000")
    for name in ("mountinfo", "cgroup"):
        path = linux.proc / "self" / name
        path.write_text(f"{line}\n{path.read_text()}{line}\n")
    assert default_threads({}, linux.proc) == 2


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_group_decides(linux: Any, version: int) -> None:
    groups = linux.mount(version, "cpu", "/pod/job/step")
    write_quota(groups / "pod" / "job" / "step", version, "600000")
    write_quota(groups / "pod", version, "200000")
    assert default_threads({}, linux.proc) == 2


@pytest.mark.parametrize(("version", "quota"), [(1, "-1"), (2, "max"), (1, "no number"), (2, "")])
def test_groups_without_a_quota(linux: Any, version: int, quota: str) -> None:
    write_quota(linux.mount(version, "cpu", "/"), version, quota)
    assert default_threads({}, linux.proc) == 8


def test_inside_a_container_the_group_is_the_mounted_root(linux: Any) -> None:
    groups = linux.mount(1, "cpu", "/docker/ab", shown="/docker/ab")
    write_quota(groups, 1, "200000")
    assert default_threads({}, linux.proc) == 2
    assert [group.folder for group in control_groups("cpu", linux.proc)] == [groups]
    assert not control_groups("memory", linux.proc)


@pytest.mark.parametrize(
    ("value", "threads"),
    [("1", 1), ("3", 3), ("4,2", 4), (" 5 ", 5), ("64", 8), ("0", 8), ("-2", 8), ("", 8), ("many", 8)],
)
def test_omp_num_threads(linux: Any, value: str, threads: int) -> None:
    """It lowers the number. More threads than processors would only wait for each other."""
    assert default_threads({"OMP_NUM_THREADS": value}, linux.proc) == threads


def test_the_smallest_decides(linux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quota(linux.mount(2, "cpu", "/"), 2, "300000")
    assert default_threads({"OMP_NUM_THREADS": "2"}, linux.proc) == 2
    assert default_threads({"OMP_NUM_THREADS": "4"}, linux.proc) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert default_threads({"OMP_NUM_THREADS": "4"}, linux.proc) == 1


def test_a_system_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_threads({}, tmp_path / "nothing") == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert default_threads({}, tmp_path / "nothing") == (os.cpu_count() or 1)


@pytest.fixture
def real_group() -> Iterator[tuple[Path, int]]:
    """A new control group of this machine for the controller cpu, inside that of this process, and its version."""
    for group in control_groups("cpu"):
        folder, name = group.folder / f"flexvar-test-{os.getpid()}", {1: "cpu.cfs_quota_us", 2: "cpu.max"}
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / name[group.version]).exists():
            yield folder, group.version
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("control groups for the controller cpu cannot be made here (this needs root)")


def test_a_real_quota(real_group: tuple[Path, int]) -> None:
    folder, version = real_group
    write_quota(folder, version, "100000")
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from flexvar_runtime.machine.processors import default_threads; print(default_threads({}))"
    )
    command = [sys.executable, "-c", code, str(folder / "cgroup.procs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
