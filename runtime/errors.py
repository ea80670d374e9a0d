"""Typed errors: every refusal says what was got, what was expected and how to fix it."""

from __future__ import annotations


class FlexVARError(Exception):
    """Base of every error the runtime raises on purpose.

    got, expected, fix: short phrases, joined into the message. `exit_code` is the code with which the
    command line ends.
    """

    exit_code = 1

    def __init__(self, got: str, *, expected: str, fix: str) -> None:
        super().__init__(f"got {got}; expected {expected}; fix: {fix}")
        self.got, self.expected, self.fix = got, expected, fix

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive pickling between processes
        return _rebuild, (type(self), self.got, self.expected, self.fix)


def _rebuild(kind: type[FlexVARError], got: str, expected: str, fix: str) -> FlexVARError:
    return kind(got, expected=expected, fix=fix)


class InvalidInput(FlexVARError, ValueError):
    """A class, schedule, option or seed out of its range."""

    exit_code = 2


class CostUnknown(InvalidInput):
    """A deadline for generations whose time was not measured. schedule: the first one of which it has to be known; ""
    after it was sent between processes."""

    def __init__(self, got: str, *, expected: str, fix: str, schedule: str = "") -> None:
        super().__init__(got, expected=expected, fix=fix)
        self.schedule = schedule


class ParityFailed(FlexVARError):
    """A graph does not agree with the reference."""

    exit_code = 3


class EnvironmentFailed(FlexVARError):
    """The machine is at fault, not the request: a full disk, a missing permission or library."""

    exit_code = 4


class BackendUnavailable(EnvironmentFailed):
    """A backend that was asked for cannot run here, or cannot run this bundle."""


class DeviceFailed(EnvironmentFailed):
    """A GPU reported an error while working."""


class ArtifactRefused(FlexVARError):
    """A checkpoint, bundle, engine or image whose content is not what it claims to be."""

    exit_code = 5


class OutOfMemory(FlexVARError, MemoryError):
    """The request does not fit in memory."""

    exit_code = 6
