"""Locks on files and directories. The system releases them when their process ends, however it ends.

Unlike a process id, a lock is valid across containers and is never reused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def lock(path: Path, *, wait: bool) -> int | None:
    """Take an exclusive lock. Returns the descriptor that holds it, or None where locks do not work.

    Links are not followed. Raises BlockingIOError if another process holds it and `wait` is False, FileNotFoundError.
    """
    if sys.platform == "win32":
        return None
    access = os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR  # network folders lock only what is writable
    try:
        held = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(held)
        if isinstance(error, BlockingIOError) or not isinstance(error, OSError):
            raise
        return None
    return held


def unlock(held: int | None) -> None:
    """Release a lock."""
    if held is not None:
        os.close(held)


def holds(held: int, path: Path) -> bool:
    """Whether `path` still names the file that is locked."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(held), os.lstat(path))
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock, if locks work here. Waits for other processes."""
    held = lock(path, wait=True)
    try:
        yield
    finally:
        unlock(held)
