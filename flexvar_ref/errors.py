"""The errors that this package raises on purpose. Each says what is wrong and how to fix it."""

from __future__ import annotations


class FlexVARRefError(ValueError):
    """Base class of all errors of this package.

    got: a sentence that says what is wrong and names the argument, setting or file at fault. expected: a short phrase,
    for programs. fix: a sentence that says what to do. The text of the error is `got` followed by `fix`. exit_code: the
    exit code of the command line.
    """

    exit_code = 1

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{got} {fix}")
        self.got, self.expected, self.fix = got, expected, fix

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive pickling between processes
        return _rebuild, (type(self), self.got, self.expected, self.fix)


def _rebuild(kind: type[FlexVARRefError], got: str, expected: str, fix: str) -> FlexVARRefError:
    return kind(got, expected=expected, fix=fix)


class InvalidInput(FlexVARRefError):
    """An argument of the wrong shape, or a value outside its range."""

    exit_code = 2


class CheckpointError(FlexVARRefError):
    """A checkpoint that is unsafe, incomplete, or made for a model of another size."""

    exit_code = 5


class TrainingError(FlexVARRefError):
    """Base class of the errors of training."""

    exit_code = 2


class ConfigError(TrainingError):
    """A configuration with an unknown key, a value of the wrong type, or sizes that do not fit together."""


class MissingExtra(TrainingError):
    """A package that training needs is not installed."""

    exit_code = 4


class Unsupported(TrainingError):
    """Training was launched in a way that it does not support."""

    exit_code = 4


class DataError(TrainingError):
    """A data set that training cannot use."""

    exit_code = 5


class RunRefused(TrainingError):
    """A run folder, training checkpoint or weights file that cannot be used."""

    exit_code = 5
