"""Threads that the system does not let this process start: a refusal in time, where libraries would hang."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime import Bundle
from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.machine.control_groups import control_groups
from flexvar_runtime.machine.threads import SPARE, require_threads

FLEXVAR = Path(sys.executable).with_name("flexvar")


def running() -> int:
    return os.stat("/proc/self/task").st_nlink if os.path.exists("/proc/self/task") else threading.active_count()


@pytest.fixture
def threads_allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let Python start only so many threads more."""
    real = _thread.start_new_thread

    def allow(count: int) -> None:
        left = [count]

        def start(*arguments: Any) -> int:
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
            return real(*arguments)

        monkeypatch.setattr(_thread, "start_new_thread", start)
        monkeypatch.setattr(threading, "_start_new_thread", start, raising=False)
        monkeypatch.setattr(threading, "_start_joinable_thread", lambda f, **_: start(f, ()), raising=False)

    return allow


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_enough_threads(threads_allowed: Callable[[int], None], count: int) -> None:
    threads_allowed(count + SPARE)
    before = running()
    require_threads(count)
    assert running() == before


@pytest.mark.parametrize(("count", "allowed"), [(1, 0), (2, 2), (40, 17)])
def test_too_few_threads(threads_allowed: Callable[[int], None], count: int, allowed: int) -> None:
    threads_allowed(allowed)
    before, stack_size = running(), threading.stack_size()
    with pytest.raises(EnvironmentFailed, match=rf" {count} more thread.*ulimit -u") as refusal:
        require_threads(count)
    assert refusal.value.exit_code == 4
    assert running() == before and threading.stack_size() == stack_size


def test_a_bundle_is_checked_without_threads_if_one_is_asked_for(
    tiny_bundle: Path, threads_allowed: Callable[[int], None]
) -> None:
    threads_allowed(0)
    Bundle.open(tiny_bundle, workers=1)
    with pytest.raises(EnvironmentFailed, match="2 more threads"):
        Bundle.open(tiny_bundle, workers=2)


OPEN = """
import resource, sys
from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.backends import probe
from flexvar_runtime.errors import FlexVARError

bundle, backend, threads, mib = sys.argv[1:]
assert probe(backend).available
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + int(mib) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    FlexVARPipeline.from_bundle(bundle, backend, threads=int(threads))([0], "1_2", seed=0)
except FlexVARError as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc/self/statm")
@pytest.mark.parametrize(
    ("backend", "threads", "mib"), [("ort-cpu", 64, 700), ("ort-cpu", 8, 60), ("openvino", 64, 400)]
)
def test_too_little_address_space(tiny_bundle: Path, backend: str, threads: int, mib: int) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", OPEN, str(tiny_bundle), backend, str(threads), str(mib)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (4, 6), done.stderr


@pytest.fixture
def few_processes() -> Iterator[Path]:
    """A new control group of version 1 or 2 in which the number of processes can be limited."""
    for group in control_groups("pids"):
        folder = group.folder / f"flexvar-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / "pids.max").exists():
            yield folder
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("control groups for the controller pids cannot be made here (this needs root)")


def test_a_limit_of_processes(few_processes: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    def limited() -> None:
        (few_processes / "cgroup.procs").write_text(str(os.getpid()))

    command = [FLEXVAR, "generate", tiny_bundle, "--backend", "ort-cpu", "--classes", "0", "--schedule", "1_2"]
    for allowed, codes in (("1", (4,)), ("6", (4,)), ("40", (0,))):
        (few_processes / "pids.max").write_text(allowed)
        done = subprocess.run(
            [*command, "--threads", "8", "-o", tmp_path / allowed],
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limited,
        )
        assert done.returncode in codes, done.stderr
        assert "Traceback" not in done.stderr and ("threads" in done.stderr) == (done.returncode == 4)
