"""Bundles: the manifest, its checks, and opening."""

from .opening import Bundle

__all__ = ["Bundle"]
