"""The errors that the runtime raises on purpose. Each says what is wrong and how to fix it."""

from __future__ import annotations


class FlexVARError(Exception):
    """Base class of all errors of this package and of the packages that build on it.

    got: a sentence that says what is wrong and names the option, argument or file at fault. expected: a short phrase,
    for programs. fix: a sentence that says what to do. The text of the error is `got` followed by `fix`. exit_code: the
    exit code of the command line.
    """

    exit_code = 1

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"{got} {fix}")
        self.got, self.expected, self.fix = got, expected, fix

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive pickling between processes
        return _rebuild, (type(self), self.got, self.expected, self.fix)


def _rebuild(kind: type[FlexVARError], got: str, expected: str, fix: str) -> FlexVARError:
    return kind(got, expected=expected, fix=fix)


class InvalidInput(FlexVARError, ValueError):
    """A class, schedule, option or seed out of its range."""

    exit_code = 2


class CostUnknown(InvalidInput):
    """A deadline was given, but the time of a schedule was not measured.

    schedule: the first such schedule; "" after the error was sent between processes.
    """

    def __init__(self, got: str, *, expected: str, fix: str, schedule: str = "") -> None:
        super().__init__(got, expected=expected, fix=fix)
        self.schedule = schedule


class ParityFailed(FlexVARError):
    """A graph does not agree with the reference."""

    exit_code = 3


class EnvironmentFailed(FlexVARError):
    """The machine is at fault, not the request. Examples: a full disk, a missing permission, a missing library."""

    exit_code = 4


class BackendUnavailable(EnvironmentFailed):
    """A backend cannot run here, or cannot run this bundle."""


class DeviceFailed(EnvironmentFailed):
    """A GPU reported an error while working."""


class ArtifactRefused(FlexVARError):
    """A checkpoint, bundle, engine or image whose content is not what it claims to be."""

    exit_code = 5


class OutOfMemory(FlexVARError, MemoryError):
    """The request does not fit in memory."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop, or its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].removesuffix(".")
