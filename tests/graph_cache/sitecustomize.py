"""Read at the start of every Python process that has this folder on its PYTHONPATH and FLEXVAR_TEST_GRAPHS set: its
exports take graphs from that folder. Nothing is imported before the process itself asks for the exporter."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class CachedExports:
    """Finds `flexvar_export.onnx_graphs` as always, then exchanges its `export_graph`."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name != "flexvar_export.onnx_graphs":
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            from graph_cache import FOLDER, GraphCache

            module.export_graph = GraphCache(Path(os.environ[FOLDER])).export_graph  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("FLEXVAR_TEST_GRAPHS"):
    sys.meta_path.insert(0, CachedExports())
