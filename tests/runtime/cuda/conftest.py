"""The kernels on a CPU, compiled once a session for every configuration asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
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
