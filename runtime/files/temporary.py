"""Temporary files and directories beside their final names, and the removal of those that killed processes left.

Their names are `.<name>.partial-<pid>-<12 hexadecimal digits><suffix>`. The first six digits stand for the running
system. A process locks what it makes, so that others of its system see whether it is alive. A lock may not be visible
to other systems that share the folder. So what another system made is a leftover only if it is a day old.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .locks import holds, lock, unlock

PARTIAL, OLD = "partial", "old"
_LONGEST_NAME = 255  # bytes, on nearly all file systems
_LONGEST_SUFFIX = 20  # bytes
SECONDS_KEPT = 24 * 3600.0  # of a leftover of another system, or where locks do not work

_LEFTOVER = re.compile(rf"\..+\.{PARTIAL}-[0-9]+-([0-9a-f]{{6}})[0-9a-f]{{6}}(\..*)?")


def sibling(final: Path, kind: str, suffix: str = "") -> Path:
    """An unused hidden name beside `final`: `.<name>.<kind>-<pid>-<system><random><suffix>`.

    A long suffix is left out.
    """
    suffix = suffix if len(os.fsencode(suffix)) <= _LONGEST_SUFFIX else ""
    return final.with_name(f"{name_start(final, kind)}{os.getpid()}-{system_mark()}{os.urandom(3).hex()}{suffix}")


def name_start(final: Path, kind: str) -> str:
    """How the names of siblings begin: `.<name>.<kind>-`. A long name is cut and gets a hash, so that it fits."""
    name, most = final.name, _LONGEST_NAME - len(f"..{kind}-{2**32}-{0:012}") - _LONGEST_SUFFIX
    if len(whole := os.fsencode(name)) > most:
        mark = f"-{hashlib.sha256(whole).hexdigest()[:8]}"
        while len(os.fsencode(name)) > most - len(mark):
            name = name[: min(most, len(name) - 1)]
        name += mark
    return f".{name}.{kind}-"


@contextmanager
def temporary(final: Path, *, suffix: str = "", directory: bool = False) -> Iterator[Path]:
    """Make an empty temporary file or directory beside `final`. At the end remove whatever has its name then.

    Raises OSError.
    """
    path, held = _create(final, suffix, directory)
    try:
        yield path
    finally:
        _remove(path)
        unlock(held)


def remove_leftovers(folder: Path) -> None:
    """Remove this user's temporary files and directories in a folder that no living process uses."""
    user = os.geteuid() if hasattr(os, "geteuid") else None
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _LEFTOVER.fullmatch(entry.name)
            if match is None:
                continue
            with suppress(OSError):  # another process removes it
                info = entry.stat(follow_symlinks=False)
                old = time.time() - info.st_mtime > SECONDS_KEPT
                if not entry.is_symlink() and info.st_uid == (info.st_uid if user is None else user):
                    _remove_unused(folder / entry.name, old, ours=match[1] == system_mark())


def _remove_unused(path: Path, old: bool, ours: bool) -> None:
    held = lock(path, wait=False)
    try:
        if old or (ours and held is not None):
            _remove(path)
    finally:
        unlock(held)


def _create(final: Path, suffix: str, directory: bool) -> tuple[Path, int | None]:
    """Make and lock a file or directory. Another process may remove it as a leftover before it is locked."""
    while True:
        path = sibling(final, PARTIAL, suffix)
        if directory:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0), 0o666))
        with suppress(BlockingIOError, FileNotFoundError):
            held = lock(path, wait=False)
            if held is None or holds(held, path):
                return path, held
            unlock(held)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


@cache
def system_mark() -> str:
    """Six hexadecimal digits that differ between running systems. Containers on one kernel share them."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        import platform  # slow to import

        identity = platform.node().encode()
    return hashlib.sha256(identity).hexdigest()[:6]
