"""Writing engines: one builder a key at a time, and an engine that loads or nothing.

    with lock_engine(folder, wanted, receipts):        # a second builder of the same key waits here
        found = built(folder, wanted, receipts) or write_engine(folder, wanted, plan, report, receipts)

The engine is in place before its receipt: whenever a builder dies, what it leaves has no receipt and never loads. The
next builder of that key removes it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from flexvar_runtime.backends.tensorrt.engine_files import (
    RECEIPT_SCHEMA,
    EngineId,
    Found,
    PrecisionReport,
    Receipt,
    read_engine,
    read_receipts,
)
from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.private import make_private

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


@contextmanager
def lock_engine(
    folder: Path, wanted: EngineId, receipts: Path, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the name of an engine; `waiting` is called where another process holds it. Dead builders' leavings go.

    Makes both folders. Raises EnvironmentFailed (no permission, full disk), ArtifactRefused (foreign receipts).
    """
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    make_private(receipts)
    path = folder / f".{wanted.prefix}lock"
    with _disk(path):
        held = _acquire(path, waiting)
    try:
        _sweep(folder, wanted, receipts)
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                path.unlink()  # still held: whoever waits for it sees that it is gone, and makes it anew
            os.close(held)


def built(folder: Path, wanted: EngineId, receipts: Path) -> Found | None:
    """The newest engine of exactly this key that is whole."""
    known = [receipt for receipt in read_receipts(receipts, wanted.graph) if receipt.key == wanted.key]
    for receipt in sorted(known, key=lambda receipt: receipt.created, reverse=True):
        found = Found(folder / receipt.engine, receipt)
        if os.path.lexists(found.path):
            try:
                read_engine(found)
            except ArtifactRefused as error:
                log.warning("%s; it is built again", error.got)
            else:
                return found
    return None


def write_engine(
    folder: Path, wanted: EngineId, plan: memoryview | bytes, precision: PrecisionReport, receipts: Path
) -> Found:
    """Write an engine, then its receipt, and remove what they replace. Call it within `lock_engine`.

    Raises EnvironmentFailed (full disk, no permission); then neither is left.
    """
    values = {field.name: getattr(wanted, field.name) for field in fields(EngineId)}
    receipt = Receipt(
        **values,
        schema_version=RECEIPT_SCHEMA,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        size=memoryview(plan).nbytes,
        created=datetime.now(UTC).isoformat(),
        precision=precision,
    )
    path = folder / receipt.engine
    with _disk(folder), atomic_write(path, force=True) as temporary:
        temporary.write_bytes(plan)
    try:
        with _disk(receipts), atomic_write(receipts / f"{receipt.stem}.json", force=True) as temporary:
            temporary.touch(mode=0o600, exist_ok=False)
            temporary.write_bytes(receipt.to_bytes())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    for old in _own_files(folder, wanted.prefix):
        if old != path:
            _remove(old)
    return Found(path, receipt)


def _acquire(path: Path, waiting: Callable[[], None]) -> int | None:
    """An exclusive lock on a file that is still the one of that name; None where the system has no such locks."""
    if sys.platform == "win32":
        return None
    told = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                    told = True
                fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # the one before took the name away
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _sweep(folder: Path, wanted: EngineId, receipts: Path) -> None:
    """Remove this user's half-written files of a key, and engines of it that no receipt vouches for."""
    vouched = {receipt.engine for receipt in read_receipts(receipts, wanted.graph)}
    for path in (*_own_files(folder, f".{wanted.prefix}"), *_own_files(folder, wanted.prefix)):
        if path.name not in vouched and not path.name.endswith("lock"):
            _remove(path)


def _own_files(folder: Path, prefix: str) -> list[Path]:
    """Files of this user whose names begin so; the folder may be shared."""
    user = os.geteuid() if hasattr(os, "geteuid") else None
    with os.scandir(folder) as entries:
        return [
            folder / entry.name
            for entry in entries
            if entry.name.startswith(prefix)
            and not entry.is_dir(follow_symlinks=False)
            and (user is None or entry.stat(follow_symlinks=False).st_uid == user)
        ]


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """What the system says of a disk, as a typed error."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailed(
            f"{path} ({error.strerror or error})",
            expected="a folder that can be written, with room for the engine",
            fix="free space or correct the permissions, or name another folder with --engines",
        ) from error
