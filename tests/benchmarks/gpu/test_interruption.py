"""A run that is killed in the middle: its file is complete JSON of what was known, and nothing goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

RUN = """
import signal, sys, time
from pathlib import Path
from flexvar_bench.gpu import measurement
from flexvar_bench.gpu.plan import Phase
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
measurement.CUDA_PROBE = "print('1.2.0')"
folder = Path(sys.argv[1])
command = (sys.executable, str(folder / "phase.py"))
environment = measurement.environment(folder, [])
setup = measurement.RunSetup(folder / "result.json", folder, environment, "d16", {}, "x", command)
plan = [Phase("growth quick", "quick"), Phase("growth long", "long"), Phase("growth never", "quick")]
measurement.measure(plan, setup, measurement.Clock(time.monotonic(), 60))
"""
PHASE = """
import json, os, sys, time
from pathlib import Path
from flexvar_bench.gpu.child import _end_with_parent
job, result = sys.argv[1], Path(sys.argv[sys.argv.index("--result") + 1])
_end_with_parent()
result.write_text(json.dumps({"backend": "b", "model": "m", "pid": os.getpid()}))
time.sleep(60 if job == "long" else 0)
"""


def known(result: Path) -> dict[str, Any]:
    """The phases in the file, at whatever moment."""
    phases: dict[str, Any] = json.loads(result.read_text())["phases"]
    return phases


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=lambda kind: kind.name)
def test_the_result_of_a_killed_run(kind: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "phase.py").write_text(PHASE)
    result = tmp_path / "result.json"
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env=dict(os.environ))
    until = time.monotonic() + 60
    while not (result.exists() and known(result)["growth long"]["result"]):
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.02)
    child = known(result)["growth long"]["result"]["pid"]
    assert not is_gone(child)
    run.send_signal(kind)
    assert run.wait(20) == (-9 if kind is signal.SIGKILL else 143)
    phases = known(result)
    assert phases["growth quick"]["status"] == "done"
    assert phases["growth long"]["status"] == ("running" if kind is signal.SIGKILL else "stopped")
    assert phases["growth long"]["result"]["pid"] == child, "what it had found is kept"
    assert phases["growth never"]["reason"] == "not measured: not reached"
    while not is_gone(child):
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.05)
