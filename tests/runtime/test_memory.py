"""How much memory is left, and that the estimates of what is needed are no fiction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flexvar_runtime import OutOfMemory, ScaleSchedule
from flexvar_runtime.manifest import ModelFacts
from flexvar_runtime.memory import available_bytes, decode_bytes, loop_bytes, require

MIB = 2**20
D16 = ModelFacts(
    depth=16,
    width=1024,
    heads=16,
    head_size=64,
    classes=1000,
    class_names=None,
    null_class=1000,
    vocabulary=8912,
    code_dim=32,
    downsampling=16,
    value_range=(-1.0, 1.0),
    position_side=32,
)


@pytest.fixture
def system(tmp_path: Path) -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine with 800 MiB left, and a process in the group /work/job, without limits."""
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
    """Checking the hashes of a bundle fills the group with file cache: that memory is still there to be had."""
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


def test_require() -> None:
    require(2**40, None, "anything", "nothing")
    require(5, 5, "what fits", "nothing")
    with pytest.raises(OutOfMemory) as refusal:
        require(3 * 2**30, 2**29, "a batch of 4", "use a batch of at most 1")
    text = "got a batch of 4 that needs 3.0 GiB; expected at most 0.5 GiB; fix: use a batch of at most 1"
    assert str(refusal.value) == text and refusal.value.exit_code == 6


def test_the_loops_estimate_by_hand() -> None:
    """Keys and values of d16 at 256 px: 2 · 680 tokens · 16 blocks · 1024 · 2 branches · 4 bytes = 170 MiB and more."""
    ten = ScaleSchedule.parse("1_2_3_4_5_6_8_10_13_16")
    cache, logits = 2 * 680 * 16 * 1024 * 2 * 4, 256 * 8912 * 4
    guided = loop_bytes(D16, ten, 1, True, 4)
    assert cache + logits < guided < 2.5e9  # with the weights it stays below what one image may take
    assert loop_bytes(D16, ten, 8, True, 4) == 8 * guided
    assert guided - loop_bytes(D16, ten, 1, True, 2) >= cache / 2
    assert loop_bytes(D16, ten, 1, False, 4) == (guided + logits) // 2
    assert decode_bytes(D16, (16, 16)) == decode_bytes(D16, (8, 32)) == 6 * 256 * 256 * 128 * 4


PEAK = """
import sys
from pathlib import Path
from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.memory import loop_bytes

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

with FlexVARPipeline.from_bundle(sys.argv[1]) as pipe:
    list(pipe.iter_scales([0], schedule="1_2"))
    before, schedule = peak(), ScaleSchedule.parse(sys.argv[2])
    list(pipe.iter_scales([0] * int(sys.argv[3]), schedule=schedule))
    print(peak() - before, loop_bytes(pipe.model, schedule, int(sys.argv[3]), True, 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no record of the largest memory taken")
@pytest.mark.parametrize(("schedule", "images"), [("1_2_3_4_5_6_8_10_13_16", 16), ("512px", 3)])
def test_the_loops_estimate_holds(tiny_bundle: Path, schedule: str, images: int) -> None:
    command = [sys.executable, "-c", PEAK, str(tiny_bundle), schedule, str(images)]
    taken, estimate = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    # above it the system would kill what was let through; far below it requests that fit would be refused
    assert 0.5 * estimate < taken < 1.25 * estimate
