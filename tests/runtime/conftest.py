"""Machines that lack things."""

from __future__ import annotations

import importlib
import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

import pytest

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
