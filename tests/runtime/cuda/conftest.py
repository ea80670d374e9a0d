"""The kernels on a CPU, compiled once per session and configuration, and a machine with an emulated GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_machine import Machine, make_machine
from host_kernels import HostKernels

from flexvar_runtime.cuda.kernels import KernelConfig


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HostKernels]:
    """(config, block=None, source=None) -> HostKernels."""
    built: dict[Any, HostKernels] = {}

    def build(config: KernelConfig, *, block: int | None = None, source: str | None = None) -> HostKernels:
        key = config, block, source
        if key not in built:
            built[key] = HostKernels(config, tmp_path_factory.mktemp("kernels"), block=block, source=source)
        return built[key]

    return build


@pytest.fixture
def machine(
    tiny_bundle: Path, host_kernels: Callable[..., HostKernels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return make_machine(tiny_bundle, host_kernels, tmp_path / "engines", tmp_path / "state" / "flexvar" / "receipts")
