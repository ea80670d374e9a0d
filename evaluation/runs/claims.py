"""Claims: files that say which process is making a shard. Any number of processes and machines share one folder.

A claim is made with O_EXCL and locked, so a process of the same system sees at once that its owner is gone. A lock may
not be visible to another machine that shares the folder. So the claim of another machine counts as left behind only
when its owner has not touched it for SECONDS_KEPT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexvar_runtime.files.locks import holds, lock, unlock
from flexvar_runtime.files.temporary import system_mark

SUFFIX = ".claim"
SECONDS_KEPT = 900.0
"""Seconds after which the claim of another machine may be taken over. A claim is touched after every batch."""


class Claim:
    """A claim that this process holds. lock: descriptor that holds the lock, None where locks do not work."""

    def __init__(self, path: Path, lock: int | None) -> None:
        self.path, self._lock = path, lock

    def touch(self) -> None:
        """Show that the owner is alive."""
        with suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Remove the claim."""
        with suppress(FileNotFoundError):
            self.path.unlink()
        unlock(self._lock)


@contextmanager
def claimed(path: Path) -> Iterator[Claim | None]:
    """Claim a shard for the body. Yields None if a living process holds the claim. The claim is removed at the end.

    Raises OSError if the folder cannot be written.
    """
    claim = _take(path)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _take(path: Path) -> Claim | None:
    """A new claim, or one that was left behind. None if a living process holds it."""
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileExistsError:
            return _take_over(path)
        with os.fdopen(descriptor, "w") as file:
            file.write(system_mark())
        with suppress(BlockingIOError, FileNotFoundError):  # another process has taken it for one left behind
            held = lock(path, wait=False)
            if held is None or holds(held, path):
                return Claim(path, held)
            unlock(held)


def _take_over(path: Path) -> Claim | None:
    """Take over a claim that was left behind."""
    try:
        age = time.time() - os.lstat(path).st_mtime
        ours = path.read_text(encoding="utf-8", errors="replace") in ("", system_mark())
        held = lock(path, wait=False)
    except (BlockingIOError, FileNotFoundError):  # its owner lives, or has just finished
        return None
    left_behind = age > SECONDS_KEPT or (ours and held is not None)
    if not left_behind or (held is not None and not holds(held, path)):
        unlock(held)
        return None
    with suppress(OSError):
        path.write_text(system_mark(), encoding="utf-8")
    return Claim(path, held)
