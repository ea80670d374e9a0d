"""Our kernels against the host and float64 as a GPU machine checks them, on the emulated device; faults are found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeDevice
from host_kernels import HostKernels

from flexvar_bench.gpu import first_gpu, kernel_checks, layer_checks, sanitizer, tools
from flexvar_bench.gpu.kernel_harness import Check, KernelHarness
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.compilation import KernelSet
from flexvar_runtime.cuda.kernels import KernelConfig
from flexvar_runtime.cuda.layers import HALVES, LayerConfig
from flexvar_runtime.errors import BackendUnavailable, DeviceFailed


@pytest.fixture(autouse=True)
def emulated(kernels: Callable[[KernelSet], HostKernels], monkeypatch: pytest.MonkeyPatch) -> None:
    def start_gpu() -> FakeDevice:
        device = FakeDevice(kernels)
        device.activate()
        return device

    monkeypatch.setattr(first_gpu, "start_gpu", start_gpu)


def test_all_hold_and_the_sanitizer_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_tool", lambda *_: None)
    sanitizer.sanitize(saved.append, small=True)
    equal, close = saved[-1]["equal_host"], saved[-1]["float64"]
    assert all(equal.values()) and {name.split()[0] for name in equal} == set(KernelConfig.names)
    assert all(check["holds"] for check in close.values()) and json.loads(json.dumps(saved))
    checked = {name.split()[0].strip(",") for name in close} | {"group_statistics", "group_normalise"}
    assert checked - {"group", "memory"} == set(LayerConfig.names)
    for half in HALVES:
        assert sum(f" {half} " in name for name in close) > 90
    assert saved[-1]["memcheck"] == {"reason": "not measured: compute-sanitizer is not installed here"}


def test_a_wrong_result_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    monkeypatch.setattr(sanitizer, "find_tool", lambda *_: None)
    monkeypatch.setattr(sanitizer, "layer_checks", lambda *_, **__: iter([Check("embed", math.nan, 1.0)]))
    monkeypatch.setattr(kernel_checks, "to_uint8", lambda image: np.zeros((2, 33, 31, 3), np.uint8))
    with pytest.raises(DeviceFailed, match="to_uint8, embed"):
        sanitizer.sanitize(saved.append, small=True)
    assert saved[-1]["float64"] == {"embed": {"error": None, "bound": 1.0, "holds": False}}


MUTANTS = [
    ("values[i][k] -= mean;", "", ("modulate_rows", "guide_rows")),
    ("key[k] *= key_factor;", "", ("split_heads",)),
    ("mean * mean), 0.0f)", "0.0), 0.0f)", ("group norm",)),
    ("if (thread == 0) finished[image] = 0;", "", ("group norm",)),
    ("token >= tokens ? LATEST_SCALE : ", "", ("attention",)),
]


@pytest.mark.parametrize(("old", "new", "named"), MUTANTS, ids=[names[0] for _, _, names in MUTANTS])
def test_mutants_are_noticed(
    old: str, new: str, named: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of one configuration, with one fault."""
    config = layer_checks.SMALL_CONFIGS[0]
    assert old in config.source
    mutant = HostKernels(config, tmp_path, source=config.source.replace(old, new))
    device = FakeDevice(lambda _: mutant)
    device.activate()
    monkeypatch.setattr(first_gpu, "start_gpu", lambda: device)
    monkeypatch.setattr(layer_checks, "SMALL_CONFIGS", (config,))
    wrong = [check.name for check in layer_checks.layer_checks(KernelHarness(), small=True) if not check.holds]
    assert wrong and all(name.startswith(named) for name in wrong)


def test_a_write_outside_an_array_is_noticed() -> None:
    harness = KernelHarness()
    array = harness.nan(3, 5, dtype="bfloat16")
    assert np.isnan(harness.values(array)).all() and harness.changed_guards() == 0
    harness.device.zero(DeviceArray(array.address - 2, (17,), "bfloat16", array.memory))
    assert harness.changed_guards() == 4
    harness.close()


def test_the_checks_as_a_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As compute-sanitizer runs it."""
    monkeypatch.setattr(kernel_checks, "layer_checks", lambda _: iter([Check("embed", 0.5, 1.0)]))
    assert kernel_checks.main() == 0
    assert capsys.readouterr().out == "19 of 19 checks hold\n"
    monkeypatch.setattr(kernel_checks, "layer_checks", lambda _: iter([Check("embed", 2.0, 1.0)]))
    assert kernel_checks.main() == 1
    assert capsys.readouterr().out == "BAD embed 2\n18 of 19 checks hold\n"


@pytest.fixture
def memcheck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for compute-sanitizer that finds one error, and kernels without a fault."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '1 error'\necho 'a traceback' >&2\nexit 7\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sanitizer, "kernel_checks", lambda _: {"draws": True})
    monkeypatch.setattr(sanitizer, "layer_checks", lambda *_, **__: iter(()))
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
