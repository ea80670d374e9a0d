"""Machines that lack things, or limit them, and the kernels on a CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from host_kernels import HostKernels

from flexvar_runtime.cuda.compilation import KernelSet

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that these wheels are installed (in `folders`), and that importing onnxruntime gives `module` or raises
    it. There is no openvino then."""

    def pretend(*wheels: str, module: str | Exception | None = "1.31.1", folders: tuple[str, ...] = ()) -> None:
        def distribution(name: str) -> Any:
            if name not in wheels:
                raise importlib.metadata.PackageNotFoundError(name)
            folder = folders[wheels.index(name)] if folders else "/site"
            return types.SimpleNamespace(version="1.31.1", locate_file=lambda _: folder)

        def load(name: str, package: str | None = None) -> Any:
            if name == "openvino":
                raise ModuleNotFoundError("No module named 'openvino'")
            if name != "onnxruntime":
                return real(name, package)
            if isinstance(module, Exception):
                raise module
            found = types.ModuleType(name)
            if module is not None:
                found.__version__ = module  # type: ignore[attr-defined]
            return found

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        monkeypatch.setattr(importlib, "import_module", load)

    real = importlib.import_module
    return pretend


@dataclass(frozen=True)
class FakeLinux:
    """Trees like /proc and /sys/fs/cgroup. 800 MiB are available; there are no control groups yet."""

    root: Path

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    def mount(self, version: int, controller: str, group: str, shown: str = "/") -> Path:
        """Mount a tree of control groups and put the process into a group. Returns the mount point.

        shown: the part of the tree that is mounted.
        """
        point = self.root / "cgroup" / f"v{version} {controller}"
        inside = Path(group).relative_to(shown) if Path(group).is_relative_to(shown) else Path(group.lstrip("/"))
        (point / inside).mkdir(parents=True, exist_ok=True)
        kind, options = ("cgroup2", "rw") if version == 2 else ("cgroup", f"rw,{controller},other")
        written = str(point).replace(" ", "\\040")
        for name, line in (
            ("mountinfo", f"33 31 0:30 {shown} {written} rw,nosuid shared:9 - {kind} {kind} {options}"),
            ("cgroup", f"0::{group}" if version == 2 else f"4:{controller},other:{group}"),
        ):
            with (self.proc / "self" / name).open("a") as file:
                file.write(f"{line}\n")
        return point


@pytest.fixture
def linux(tmp_path: Path) -> FakeLinux:
    """A system without control groups."""
    system = FakeLinux(tmp_path)
    (system.proc / "self").mkdir(parents=True)
    (system.proc / "meminfo").write_text("MemTotal:    2048000 kB\nMemFree:  1000 kB\nMemAvailable:   819200 kB\n")
    (system.proc / "self" / "mountinfo").write_text("31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw\n")
    (system.proc / "self" / "cgroup").write_text("9:name=systemd:/\n")
    return system


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HostKernels]:
    """(config, block=None, source=None) -> HostKernels, compiled once per session and configuration."""
    built: dict[Any, HostKernels] = {}

    def build(config: KernelSet, *, block: int | None = None, source: str | None = None) -> HostKernels:
        key = config, block, source
        if key not in built:
            built[key] = HostKernels(config, tmp_path_factory.mktemp("kernels"), block=block, source=source)
        return built[key]

    return build
