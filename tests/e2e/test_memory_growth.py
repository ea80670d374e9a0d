"""The memory of a server that is asked for ever new sizes stays bounded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc/self/statm"),
]

# The first 20 requests fill the buffers that are kept.
REQUESTS = """
import random, resource, sys
from flexvar_runtime import FlexVARPipeline

bundle, backend = sys.argv[1:]
draw = random.Random(1)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

with FlexVARPipeline.from_bundle(bundle, backend, threads=2) as pipeline:
    for i in range(301):
        size = f"{draw.randrange(2, 24)}x{draw.randrange(2, 24)}"
        pipeline([1] * draw.choice([1, 2, 3]), f"1_2_{size}", seed=i)
        if i == 20:
            first = resident()
    print(resident() - first)
"""
ALLOWED_MB = 220  # about 150 are measured; without a bound it is 500, and twice as much after twice as many requests


@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp32", "ort-cpu"), ("fp32", "openvino"), ("bf16", "openvino"), ("int8-bf16", "ort-openvino")],
)
def test_new_sizes(tiny_bundles: Callable[[str], Path], precision: str, backend: str) -> None:
    if "openvino" in backend:
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", REQUESTS, str(tiny_bundles(precision)), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= ALLOWED_MB
