"""Write a bundle. It appears complete under its final name, or not at all.

    with write_bundle("d24.bundle") as directory:
        ...                                   # write the files
        seal(directory, manifest)             # record them in the manifest; may be called again

A writer that is killed leaves only a temporary directory, which the next writer in the same folder removes (see
`flexvar_runtime.files.temporary`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from flexvar_runtime.bundle.manifest import MANIFEST, Manifest
from flexvar_runtime.bundle.opening import Bundle, check_listing, hash_files, inventory, read_manifest
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import already_exists, atomic_write, fsync, require_parent
from flexvar_runtime.files.directories import find_old, replace_directory
from flexvar_runtime.files.locks import locked
from flexvar_runtime.files.strict_json import loads
from flexvar_runtime.files.temporary import PARTIAL, remove_leftovers, sibling, temporary


@contextmanager
def write_bundle(final: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield a new directory beside `final`. The body fills and seals it. Then it is fsynced and renamed to `final`.

    An exception in the body removes the directory. `force` replaces an existing bundle, and nothing else. The old
    bundle is removed after the new one has its name. Raises InvalidInput (`final` exists), ArtifactRefused.
    """
    final = Path(os.path.abspath(final))
    require_parent(final)
    final = final.parent.resolve() / final.name
    with locked(final.parent):
        _sweep(final)
        _check_target(final, force)
    with temporary(final, directory=True) as partial:
        yield partial
        check_listing(partial, Manifest.from_bytes(read_manifest(partial)))
        _fsync_tree(partial)
        _publish(partial, final, force)


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
    """Rename `partial` to `final`. An existing bundle gets the name `partial`."""
    with locked(final.parent):
        _check_target(final, force)
        if os.path.lexists(final):
            replace_directory(partial, final)
        else:
            try:
                os.rename(partial, final)
            except OSError:
                if os.path.lexists(final):  # created since the check, where locks do not work
                    raise already_exists(final) from None
                raise
        fsync(final.parent)


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
    """Remove what killed writers left. A bundle whose replacement was interrupted gets its name back."""
    if not os.path.lexists(final):
        for old in find_old(final)[:1]:
            old.rename(final)
    for old in find_old(final):
        with suppress(OSError):  # it may be removed in part, so it must not be restored later
            old.rename(sibling(final, PARTIAL))
    remove_leftovers(final.parent)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))
