"""Our kernels against the host as a GPU machine checks them, on the emulated device; a wrong one is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_bench.gpu import first_gpu, kernel_checks, sanitizer, tools
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed


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
    assert saved[-1]["memcheck"] == {"reason": "not measured: compute-sanitizer is not installed here"}


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_tool", lambda *_: None)
    monkeypatch.setattr(kernel_checks, "to_uint8", lambda image: np.zeros((2, 33, 31, 3), np.uint8))
    with pytest.raises(DeviceFailed, match="to_uint8"):
        sanitizer.sanitize(saved.append)


@pytest.fixture
def memcheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for compute-sanitizer that finds one error, and kernels that agree with the host."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '1 error'\necho 'a traceback' >&2\nexit 7\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sanitizer, "kernel_checks", lambda: {"draws": True})
    return tool


def test_what_memcheck_finds(memcheck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_gpu", lambda: None)
    with pytest.raises(DeviceFailed, match="1 error"):
        sanitizer.sanitize(saved.append)
    assert saved[-1]["memcheck"]["exit_code"] == 7 and saved[-1]["memcheck"]["stderr"] == "a traceback"
    memcheck.write_text("#!/bin/sh\nexit 0\n")
    sanitizer.sanitize(saved.append)
    assert saved[-1]["memcheck"]["exit_code"] == 0


@pytest.mark.usefixtures("memcheck")
def test_memcheck_is_not_started_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rehearsal the kernels are emulated, and the child of memcheck would look for a real GPU."""

    def find_gpu() -> None:
        raise BackendUnavailable("no working NVIDIA driver", expected="a GPU", fix="install one")

    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_gpu", find_gpu)
    sanitizer.sanitize(saved.append)
    assert saved[-1]["memcheck"] == {"reason": "not measured: there is no GPU here (no working NVIDIA driver)"}


def test_a_tool_in_a_folder_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "usr" / "local" / "cuda-13" / "bin"
    folder.mkdir(parents=True)
    (folder / "compute-sanitizer").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find_tool("compute-sanitizer", tmp_path) == folder / "compute-sanitizer"
    assert tools.find_tool("nvcc", tmp_path) is None
