"""A fork while a pipeline is open: the child is refused the pipeline, and it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")

# Each child does one thing and then ends as an interpreter does, which frees what is left.
FORKS = """
import gc, os, sys, threading, time
from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.errors import FlexVARError

bundle, backend, busy = sys.argv[1:]
pipes = [FlexVARPipeline.from_bundle(bundle, backend, threads=2)]
pipes[0]([3], "1_2_4", seed=0)
scales = pipes[0].iter_scales([1], "1_2_4", seed=1)
next(scales)

def end(): pass
def close(): pipes[0].close()
def drop():
    pipes.clear()
    gc.collect()
def stop_iterating():
    global scales
    del scales
    gc.collect()
def leave_a_with_block():
    with pipes[0]:
        pass
def use():
    for action in (lambda: pipes[0]([3], "1_2"), lambda: pipes[0].decode([[[0]]]), lambda: next(scales)):
        try:
            action()
        except FlexVARError as error:
            assert "fork" in str(error) and "spawn" in str(error), error
        else:
            sys.exit("no refusal")
def open_another():
    if backend == "ort-cpu":
        with FlexVARPipeline.from_bundle(bundle, backend, threads=2) as other:
            other([3], "1_2", seed=0)
        return
    try:  # the threads of OpenVINO belong to the process
        FlexVARPipeline.from_bundle(bundle, backend)
    except FlexVARError as error:
        assert "spawn" in str(error), error
    else:
        sys.exit("no refusal")

actions = [end, close, drop, stop_iterating, leave_a_with_block, use, open_another]
if busy == "busy":
    started = threading.Event()
    def work():
        for seed in range(10**6):
            pipes[0]([3], "1_2_4", seed=seed, on_scale=lambda _: started.set())
    threading.Thread(target=work, daemon=True).start()
    started.wait()
for action in actions:
    child = os.fork()
    if not child:
        action()
        sys.exit(0)
    end_of_patience = time.monotonic() + 30
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end_of_patience:
            os.kill(child, 9)
            sys.exit(f"{action.__name__}: the child does not end")
        time.sleep(0.005)
    if status:
        sys.exit(f"{action.__name__}: status {status}")
if busy != "busy":
    pipes[0]([3], "1_2_4", seed=0)  # the parent goes on
os._exit(0)
"""
BACKENDS = {"ort-cpu": "fp32", "openvino": "fp32", "ort-openvino": "int8-bf16"}


@pytest.mark.parametrize("busy", ["idle", "busy"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_children(tiny_bundles: Callable[[str], Path], backend: str, busy: str) -> None:
    """busy: another thread of the parent is in a request."""
    if "openvino" in backend:
        pytest.importorskip("openvino")
    command = [sys.executable, "-W", "ignore", "-c", FORKS, str(tiny_bundles(BACKENDS[backend])), backend, busy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stderr == "", done.stderr
