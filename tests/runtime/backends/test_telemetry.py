"""ONNX Runtime and OpenVINO send nothing and leave nothing in the home directory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexvar_runtime.backends.loading import TELEMETRY_SWITCH, telemetry

GENERATE = """
import sys
from flexvar_runtime import FlexVARPipeline
with FlexVARPipeline.from_bundle(sys.argv[1], sys.argv[2], threads=1) as pipeline:
    pipeline([0], "1_2", seed=0)
"""
INTERNET = re.compile(r"(?:connect|send\w*)\(.*sa_family=AF_INET")


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_no_internet_socket_and_no_file(tiny_bundle: Path, tmp_path: Path, backend: str) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    if backend == "openvino":
        pytest.importorskip("openvino")
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    done = subprocess.run(
        [strace, "-f", "-e", "trace=network", "-o", trace, sys.executable, "-c", GENERATE, tiny_bundle, backend],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    text = trace.read_text(errors="replace")
    if "exited with 0" not in text and "ptrace" in done.stderr:
        pytest.skip("this process may not trace others")
    assert done.returncode == 0, done.stderr
    assert not INTERNET.findall(text)
    left = [path for path in home.rglob("*") if path.is_file() and "flexvar" not in path.parts]
    assert not left


LOAD = """
import os, sys
from flexvar_runtime.backends.loading import load_onnxruntime, load_openvino
load_onnxruntime(), load_openvino()
import openvino
print(os.environ["ORT_DISABLE_TELEMETRY"], type(openvino.tools.ovc.telemetry).__module__.partition(".")[0])
print(sys.modules.get("openvino_telemetry", "not imported"))
import openvino_telemetry  # whoever wants it can still import it
"""


@pytest.mark.parametrize(("chosen", "kept"), [(None, "1"), ("1", "1"), ("0", "0"), ("", "")])
def test_what_the_user_chose_is_kept(tmp_path: Path, chosen: str | None, kept: str) -> None:
    pytest.importorskip("openvino")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CI": "true"}  # CI: nothing is sent with 0 either
    if chosen is not None:
        environment[TELEMETRY_SWITCH] = chosen
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{kept} openvino\nnot imported\n"


@pytest.mark.parametrize(("chosen", "said"), [(None, "off"), ("1", "off"), ("0", "ORT_DISABLE_TELEMETRY=0")])
def test_what_doctor_says(monkeypatch: pytest.MonkeyPatch, chosen: str | None, said: str) -> None:
    monkeypatch.delenv(TELEMETRY_SWITCH, raising=False)
    if chosen is not None:
        monkeypatch.setenv(TELEMETRY_SWITCH, chosen)
    assert telemetry() == {"onnxruntime": said, "openvino": "off"}
