"""A machine with an emulated GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_machine import Machine, make_machine
from host_kernels import HostKernels
from layer_numbers import Numbers


@pytest.fixture
def machine(
    tiny_bundle: Path, host_kernels: Callable[..., HostKernels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return make_machine(tiny_bundle, host_kernels, tmp_path / "engines", tmp_path / "state" / "flexvar" / "receipts")


@pytest.fixture
def numbers() -> Iterator[Numbers]:
    """Arrays whose guards are checked at the end."""
    made = Numbers()
    yield made
    made.check_guards()
