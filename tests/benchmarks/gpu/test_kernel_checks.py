"""Our kernels against the host as a GPU machine checks them, on the emulated device; a wrong one is found."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_bench.gpu import first_gpu, kernel_checks, sanitizer, tools
from flexvar_runtime.errors import DeviceFailed


@pytest.fixture(autouse=True)
def emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start_gpu() -> FakeDevice:
        device = FakeDevice(lambda config: HostKernels(config, tmp_path / "kernels", block=64))
        device.activate()
        return device

    monkeypatch.setattr(first_gpu, "start_gpu", start_gpu)


def test_all_are_equal_and_the_sanitizer_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_tool", lambda *_: None)
    sanitizer.sanitize(saved.append)
    found = saved[-1]["equal_host"]
    assert all(found.values()) and len(found) > 12
    assert {name.split()[0] for name in found} == {
        "draws",
        "sample_rows",
        "next_inputs",
        "gather_rows",
        "scatter_rows",
        "to_uint8",
    }
    assert saved[-1]["memcheck"] == {"reason": "not measured: no compute-sanitizer here"}


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_tool", lambda *_: None)
    monkeypatch.setattr(kernel_checks, "to_uint8", lambda image: np.zeros((2, 33, 31, 3), np.uint8))
    with pytest.raises(DeviceFailed, match="other results in to_uint8;"):
        sanitizer.sanitize(saved.append)


def test_what_memcheck_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, saved = tmp_path / "compute-sanitizer", list[dict[str, Any]]()
    tool.write_text("#!/bin/sh\necho '1 error'\nexit 7\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sanitizer, "kernel_checks", lambda: {"draws": True})
    with pytest.raises(DeviceFailed, match="memcheck: 1 error"):
        sanitizer.sanitize(saved.append)
    assert saved[-1]["memcheck"]["exit_code"] == 7
    tool.write_text("#!/bin/sh\nexit 0\n")
    sanitizer.sanitize(saved.append)
    assert saved[-1]["memcheck"]["exit_code"] == 0
    assert subprocess.run([str(tool)], check=False).returncode == 0


def test_a_tool_in_a_folder_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "usr" / "local" / "cuda-13" / "bin"
    folder.mkdir(parents=True)
    (folder / "compute-sanitizer").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find_tool("compute-sanitizer", tmp_path) == folder / "compute-sanitizer"
    assert tools.find_tool("nvcc", tmp_path) is None
