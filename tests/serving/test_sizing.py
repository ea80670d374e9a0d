"""The number of workers is measured, and `flexvar bench load` prints its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexvar_runtime import ArtifactRefused
from flexvar_serving import sizing
from flexvar_serving.settings import ModelSettings

pytestmark = pytest.mark.serving


def test_the_fastest_layout_is_chosen(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "default_threads", lambda: 2)
    said: list[str] = []
    layout = sizing.choose_layout(ModelSettings(bundle=tiny_bundle), None, said.append)
    assert len(said) == 2 and "1 worker of 2 threads" in said[0] and "2 workers of 1 thread" in said[1]
    speeds = [float(line.rpartition(": ")[2].removesuffix(" images/s")) for line in said]
    assert layout.workers == (2 if speeds[1] > sizing.GAIN * speeds[0] else 1)
    assert layout.threads == 2 // layout.workers and not layout.in_thread


def test_a_bundle_that_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRefused, match="does not exist"):
        sizing.choose_layout(ModelSettings(bundle=tmp_path / "none.bundle"), None, print)


def test_bench_load(tiny_bundle: Path) -> None:
    program = Path(sys.executable).parent / "flexvar"
    command = [
        program,
        "bench",
        "load",
        str(tiny_bundle),
        "--scenarios",
        "throughput",
        "--seconds",
        "1",
        "--turns",
        "2",
    ]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)["throughput"]
    assert set(found["statuses"]) == {"200"} and found["ratio"] > 0 and found["service_images_per_second"] > 1
