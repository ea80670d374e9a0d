"""`flexvar_runtime.bundle.manifest` under its public import path."""

from .bundle.manifest import MANIFEST, Manifest

__all__ = ["MANIFEST", "Manifest"]
