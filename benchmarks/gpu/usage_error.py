"""The error for options of `gpu_check.py` that cannot be used as given."""

from __future__ import annotations


class UsageError(ValueError):
    """An option with a wrong value, or options that do not go together. The text is complete sentences."""
