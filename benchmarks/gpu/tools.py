"""Finds programs of CUDA and of the system, on PATH or in the folders of CUDA's packages."""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDERS = ("usr/local/cuda*/bin", "opt/nvidia/*", "opt/nvidia/*/*")  # below the root: where CUDA's packages put them
NAMES = ("nvcc", "compute-sanitizer", "cuobjdump", "ncu", "nsys", "gcc", "xz")


def find_tool(name: str, root: Path = Path("/")) -> Path | None:
    """A program on PATH, or in one of CUDA's folders below `root`."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    elsewhere = (path for folder in FOLDERS for path in sorted(root.glob(f"{folder}/{name}")))
    return next((path for path in elsewhere if path.is_file()), None)


def found_tools() -> dict[str, str | None]:
    """The path of each program, or None for one that is missing."""
    return {name: None if (path := find_tool(name)) is None else str(path) for name in NAMES}
