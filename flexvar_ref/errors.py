"""What the reference refuses to load."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that is unsafe, incomplete or of another shape. Says got, expected and fix."""

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.got, self.expected, self.fix = got, expected, fix
