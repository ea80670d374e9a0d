"""What training refuses, with the exit code the command line ends with."""

from __future__ import annotations


class TrainingError(ValueError):
    """Base of what training refuses. Says got, expected and fix."""

    exit_code = 2

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.got, self.expected, self.fix = got, expected, fix


class ConfigError(TrainingError):
    """A configuration with an unknown key, a value of another type or sizes that do not fit together."""


class MissingExtra(TrainingError):
    """Training without the packages it needs."""

    exit_code = 4


class Unsupported(TrainingError):
    """A way to launch training that it does not know."""

    exit_code = 4


class RunRefused(TrainingError):
    """A run folder, training checkpoint or weights file that is not what it claims to be."""

    exit_code = 5
