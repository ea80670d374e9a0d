"""Let a child process use the graph cache in the folder FLEXVAR_TEST_GRAPHS.

Python imports this module at the start of every process that has this folder on its PYTHONPATH. It imports nothing
before the process itself imports the exporter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class CachedExports:
    """An import hook that replaces `export_graph` when `flexvar_export.onnx_graphs` is imported."""

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
