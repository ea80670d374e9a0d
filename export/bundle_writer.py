"""Write a bundle. It appears complete under its final name, or not at all.

    with write_bundle("d24.bundle") as directory:
        ...                                   # write the files
        seal(directory, manifest)             # record them in the manifest; may be called again

A writer that is killed leaves only `.<name>.partial-<pid>-<random>`. The next writer of the same name removes it. A
writer holds a lock on its directory, which shows that it is alive. Unlike a process id, a lock is valid across
containers and is never reused.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flexvar_runtime.bundle.manifest import MANIFEST, Manifest
from flexvar_runtime.bundle.opening import Bundle, check_listing, hash_files, inventory, read_manifest
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import already_exists, atomic_write, fsync, require_parent, sibling
from flexvar_runtime.files.strict_json import loads

if sys.platform != "win32":
    import fcntl


@contextmanager
def write_bundle(final: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `final`. The body fills and seals it. Then it is fsynced and renamed to `final`.

    An exception in the body removes the directory. `force` replaces an existing bundle, and nothing else. The old
    bundle is removed after the new one has its name. Raises InvalidInput (`final` exists), ArtifactRefused.
    """
    final = Path(os.path.abspath(final))
    require_parent(final)
    final = final.parent.resolve() / final.name
    with _locked(final.parent, wait=True):
        _sweep(final)
        _check_target(final, force)
        partial = sibling(final, "partial")
        partial.mkdir()
        held = _lock(partial, wait=False)
    try:
        yield partial
        check_listing(partial, Manifest.from_bytes(read_manifest(partial)))
        _fsync_tree(partial)
        _publish(partial, final, force)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _unlock(held)


def seal(directory: Path, manifest: Manifest, *, workers: int | None = None) -> Bundle:
    """Write `manifest.json` with the size and sha256 of every file in `directory`. `manifest.files` is ignored.

    workers: number of threads that hash files. Returns the bundle. Raises ArtifactRefused for links, unusable file
    names and unlisted graph files.
    """
    data = replace(manifest, files=hash_files(directory, sorted(inventory(directory)), workers)).to_bytes()
    sealed = Manifest.from_bytes(data)
    with atomic_write(directory / MANIFEST, force=True) as temporary:
        temporary.write_bytes(data)
    return Bundle(path=directory, manifest=sealed, sha256=hashlib.sha256(data).hexdigest())


def _publish(partial: Path, final: Path, force: bool) -> None:
    garbage = None
    with _locked(final.parent, wait=True):
        _check_target(final, force)
        aside = sibling(final, "old") if os.path.lexists(final) else None
        try:
            if aside is not None:
                os.rename(final, aside)
            os.rename(partial, final)
        except BaseException as error:
            taken = os.path.lexists(final)
            if aside is not None and not taken and os.path.lexists(aside):
                os.rename(aside, final)
            if aside is None and taken and isinstance(error, OSError):  # created since the check, without locks
                raise already_exists(final) from None
            raise
        fsync(final.parent)
        if aside is not None:
            garbage = aside.rename(sibling(final, "partial"))
    if garbage is not None:
        shutil.rmtree(garbage, ignore_errors=True)


def _check_target(final: Path, force: bool) -> None:
    if not os.path.lexists(final):
        return
    if not force:
        raise already_exists(final)
    if final.is_symlink() or not _looks_like_bundle(final):
        raise ArtifactRefused(
            f"{final} is not a bundle, and --force replaces nothing else.",
            expected="a bundle",
            fix="Choose another name, or remove it.",
        )


def _looks_like_bundle(path: Path) -> bool:
    """Whether a directory has a bundle's manifest, of any schema version, and not that of a browser extension."""
    try:
        document = loads(read_manifest(path), where=MANIFEST, fix="")
    except (ArtifactRefused, OSError):
        return False
    return isinstance(document, dict) and document.keys() >= {"schema_version", "graphs", "files"}


def _sweep(final: Path) -> None:
    """Restore a bundle whose replacement was interrupted, and remove directories of killed writers."""
    ours = re.compile(re.escape(f".{final.name}.") + r"(old|partial)-[0-9]+-[0-9a-f]{12}")
    for path in sorted(final.parent.glob(".*")):
        match = ours.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == "old" and not os.path.lexists(final):
            path.rename(final)
            continue
        try:
            if match[1] == "old":  # it may be removed in part, so it must not be restored later
                path = path.rename(sibling(final, "partial"))
            held = _lock(path, wait=False)
        except OSError:  # its writer is alive, or another process removes it
            continue
        if held is not None:
            shutil.rmtree(path, ignore_errors=True)
            _unlock(held)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))


@contextmanager
def _locked(directory: Path, *, wait: bool) -> Iterator[None]:
    held = _lock(directory, wait=wait)
    try:
        yield
    finally:
        _unlock(held)


def _lock(directory: Path, *, wait: bool) -> int | None:
    """Take an exclusive lock on a directory. None where the system has no such locks.

    Raises BlockingIOError where another process holds it and `wait` is False.
    """
    if sys.platform == "win32":
        return None
    with suppress(PermissionError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return fd
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise
    return None


def _unlock(held: int | None) -> None:
    if held is not None:
        os.close(held)
