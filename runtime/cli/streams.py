"""Standard output and standard error of the commands.

Text of any encoding can be written, such as the names of files. If the result cannot be written to standard output,
that is an error. Standard error never fails, because messages must not change how a command ends.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ..errors import EnvironmentFailed, first_line

_ERRORS = "flexvar_names"


class OutputLost(EnvironmentFailed):
    """The result cannot be written to standard output."""


class ReaderGone(Exception):
    """Standard output is a pipe whose reader has ended."""


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """The bytes of a file name that Python could not decode, as they are. Other characters as backslash escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return bytes([code - 0xDC00]), error.start + 1
    return ascii(error.object[error.start])[1:-1], error.start + 1


codecs.register_error(_ERRORS, _escape)


@contextmanager
def protected() -> Iterator[None]:
    """Protect `sys.stdout` and `sys.stderr` while the body runs. It raises OutputLost and ReaderGone."""
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - Python has no stream for a descriptor that was closed
    with nowhere:
        output, error = (_Output(before[0] or nowhere), _Messages(before[1] or nowhere))
        sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, error)
        try:
            with _any_encoding(before[0]), _any_encoding(before[1]):
                yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def _any_encoding(stream: TextIO | None) -> Iterator[None]:
    """Let a stream escape what its encoding does not have."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors=_ERRORS)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):  # it flushes
            stream.reconfigure(errors=errors)


class _Stream:
    """A text stream that passes its failures to `failed`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Discard what is written from now on. Otherwise Python would fail again when it flushes the stream at exit."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Output(_Stream):
    """Standard output. After its first failure, it fails each time: a library may have caught the first error."""

    _lost: Exception | None = None

    def write(self, text: str) -> int:
        self._raise_lost()
        return super().write(text)

    def flush(self) -> None:
        self._raise_lost()
        super().flush()

    def _raise_lost(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _failed(self, error: OSError) -> None:
        super()._failed(error)
        self._lost = OutputLost(
            f"The result cannot be written to standard output ({first_line(error)}).",
            expected="a standard output that takes the result",
            fix="Free space where standard output goes, or send it elsewhere.",
        )
        if isinstance(error, BrokenPipeError):
            self._lost = ReaderGone()
        raise self._lost from error


class _Messages(_Stream):
    """Standard error."""
