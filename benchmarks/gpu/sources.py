"""Our source folders, the names by which they are imported, and a hash of all source files.

`gpu_check.py` runs this file by itself, before our packages can be imported. It may import the standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "flexvar_ref": "flexvar_ref",
    "flexvar_runtime": "runtime",
    "flexvar_export": "export",
    "flexvar_bench": "benchmarks",
}  # import name: folder of the checkout


def source_hash(root: Path = ROOT) -> str:
    """The sha256 of all our source files in the checkout `root`. It tells what was measured, and what made a bundle."""
    digest = hashlib.sha256()
    for folder in sorted(PACKAGES.values()):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cu"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def link_packages(root: Path, folder: Path) -> None:
    """Link the source folders of the checkout `root` into `folder`, under the names by which they are imported."""
    for name, source in PACKAGES.items():
        (folder / name).symlink_to(root / source, target_is_directory=True)
