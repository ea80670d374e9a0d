"""Turns every exception of a parser into an error of this package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ArtifactRefused, FlexVARError, InvalidInput, OutOfMemory, first_line


@contextmanager
def refuse_failures(problem: str, *, expected: str, fix: str) -> Iterator[None]:
    """Turn every exception of a parser into ArtifactRefused, and MemoryError into OutOfMemory.

    problem: a clause that names the file, such as "photo.png cannot be read". Errors of this package pass unchanged,
    except InvalidInput: here the content of the file is at fault, not an argument.
    """
    try:
        yield
    except InvalidInput as error:
        raise ArtifactRefused(f"{problem} ({error.got.removesuffix('.')}).", expected=expected, fix=fix) from error
    except FlexVARError:
        raise
    except MemoryError as error:
        fix = "Free memory, or use a smaller file."
        raise OutOfMemory(f"{problem}, because memory is exhausted.", expected="free memory", fix=fix) from error
    except Exception as error:  # parsers of third parties raise exceptions of any type
        raise ArtifactRefused(f"{problem} ({first_line(error)}).", expected=expected, fix=fix) from error
