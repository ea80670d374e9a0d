"""Write engines. One process at a time builds an engine of a key, and an incomplete engine never loads.

    with lock_engine(folder, wanted, receipts):        # a second process with the same key waits here
        found = built(folder, wanted, receipts) or write_engine(folder, wanted, plan, report, receipts)

The engine is written before its receipt. So an engine of a killed process has no receipt and never loads. The next
process with the same key removes it.
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
from flexvar_runtime.files.temporary import remove_leftovers

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


@contextmanager
def lock_engine(
    folder: Path, wanted: EngineId, receipts: Path, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Lock the key of an engine, make both folders, and remove incomplete engines of that key.

    waiting: called once, if another process holds the lock. Raises EnvironmentFailed (no permission, full disk),
    ArtifactRefused (the folder of receipts belongs to another user).
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    make_private(receipts)
    path = folder / f".{wanted.prefix}lock"
    with _disk_errors(path):
        held = _acquire(path, waiting)
    try:
        _sweep(folder, wanted, receipts)
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                path.unlink()  # while locked: a waiting process sees that the file is gone, and creates a new one
            os.close(held)


def built(folder: Path, wanted: EngineId, receipts: Path) -> Found | None:
    """The newest intact engine of exactly this key, or None."""
    known = [receipt for receipt in read_receipts(receipts, wanted.graph) if receipt.key == wanted.key]
    for receipt in sorted(known, key=lambda receipt: receipt.created, reverse=True):
        found = Found(folder / receipt.engine, receipt)
        if os.path.lexists(found.path):
            try:
                read_engine(found)
            except ArtifactRefused as error:
                log.warning("%s The engine is built again.", error.got)
            else:
                return found
    return None


def write_engine(
    folder: Path, wanted: EngineId, plan: memoryview | bytes, precision: PrecisionReport, receipts: Path
) -> Found:
    """Write an engine, then its receipt, and remove older engines of the same key. Call it within `lock_engine`.

    Raises EnvironmentFailed (full disk, no permission). Then neither file is left.
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
    with _disk_errors(folder), atomic_write(path, force=True) as temporary:
        temporary.write_bytes(plan)
    try:
        with _disk_errors(receipts), atomic_write(receipts / f"{receipt.stem}.json", force=True) as temporary:
            temporary.chmod(0o600)
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
    """Take an exclusive lock on the file `path`, and return its descriptor. None where the system has no such locks."""
    if sys.platform == "win32":
        return None
    reported = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not reported:
                    waiting()
                    reported = True
                fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # the previous holder removed the file
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _sweep(folder: Path, wanted: EngineId, receipts: Path) -> None:
    """Remove what killed processes left, and this user's engines of a key without a receipt."""
    remove_leftovers(folder)
    complete = {receipt.engine for receipt in read_receipts(receipts, wanted.graph)}
    for path in _own_files(folder, wanted.prefix):
        if path.name not in complete:
            _remove(path)


def _own_files(folder: Path, prefix: str) -> list[Path]:
    """Files of this user whose names start with a prefix. Other users may have files in the folder too."""
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
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise OSError of the body as EnvironmentFailed."""
    try:
        yield
    except OSError as error:
        raise EnvironmentFailed(
            f"{path} cannot be written: {error.strerror or error}.",
            expected="a folder that can be written, with room for the engine",
            fix="Free space, correct the permissions, or name another folder with --engines.",
        ) from error
