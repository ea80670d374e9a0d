"""The kernels on a CPU, compiled once a session for every configuration asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.cuda.kernels import KernelConfig

sys.path.append(str(Path(__file__).parent))  # for host_kernels: tests are no packages


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(config, block=None, source=None) -> HostKernels."""
    from host_kernels import COMPILER, HostKernels

    if COMPILER is None:
        pytest.skip("no C compiler here")
    built: dict[Any, HostKernels] = {}

    def build(config: KernelConfig, *, block: int | None = None, source: str | None = None) -> HostKernels:
        key = config, block, source
        if key not in built:
            built[key] = HostKernels(config, tmp_path_factory.mktemp("kernels"), block=block, source=source)
        return built[key]

    return build
