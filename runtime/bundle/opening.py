"""Opening a bundle: every file is checked against the manifest before its content is parsed.

The cheap checks come first: manifest, names, links and sizes. Then comes the sha256 of every file. The only parser that
sees unchecked bytes is the strict JSON parser of the manifest.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from ..checks import check_whole, short
from ..errors import ArtifactRefused
from ..files.private import open_unlinked
from ..machine.processors import default_threads
from ..machine.threads import cannot_start
from ..model.signatures import WEIGHTS_OF
from ..model.tensors import GraphSpec
from .manifest import ENGINES, MANIFEST, MAX_MANIFEST_BYTES, FileRecord, Manifest

MAX_WORKERS = 1024
_COPY_AGAIN = "Copy the whole bundle again, or export it again."
_EXPORT_AGAIN = "Export the bundle again."


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. sha256: hash of `manifest.json`, which has the hashes of all other files."""

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, workers: int | None = None) -> Bundle:
        """Check a bundle and open it. workers: threads that hash files. Raises ArtifactRefused, InvalidInput."""
        root = bundle_root(path)
        data = read_manifest(root)
        manifest = Manifest.from_bytes(data)
        check_listing(root, manifest)
        for name, record in hash_files(root, manifest.files, workers).items():
            expected = manifest.files[name]
            if record != expected:
                _refuse(name, "does not match its sha256 in the manifest", f"sha256 {expected.sha256}", _COPY_AGAIN)
        return cls(path=root, manifest=manifest, sha256=hashlib.sha256(data).hexdigest())

    def file(self, name: str) -> Path:
        """The path of a file of the manifest. Raises ArtifactRefused for any other name."""
        if name not in self.manifest.files:
            known = f"one of {', '.join(self.manifest.files)}"
            _refuse(name, f"must be a file of the bundle: {known}", known, _EXPORT_AGAIN)
        return self.path / name

    def graph(self, name: str) -> GraphSpec:
        """Inputs and outputs of a graph. Raises ArtifactRefused if the bundle has no such graph."""
        if name not in self.manifest.graphs:
            known = f"one of {', '.join(self.manifest.graphs)}"
            _refuse(name, f"must be a graph of the bundle: {known}", known, _EXPORT_AGAIN)
        return self.manifest.graphs[name]

    def graph_files(self, name: str) -> tuple[str, ...]:
        """The files of a graph: itself, and its weights, which may be those of another graph."""
        file, files = self.graph(name).file, self.manifest.files
        owner = name if f"{file}.data" in files else WEIGHTS_OF.get(name, name)
        return tuple(each for each in (file, f"{self.graph(owner).file}.data") if each in files)

    def graph_file(self, name: str) -> Path:
        """The path of a graph. Raises ArtifactRefused if it takes weights from `engines/`.

        The files in `engines/` are the only ones in a bundle that are not checked. Backends refuse weights outside it.
        """
        path = self.file(self.graph(name).file)
        if ENGINES.encode() in path.read_bytes().lower():
            problem = f"names {ENGINES}/, a folder that is not checked"
            _refuse(path.name, problem, "weights in files of the manifest", _EXPORT_AGAIN)
        return path


def bundle_root(path: str | os.PathLike[str]) -> Path:
    """The real directory of a bundle, with the links in `path` resolved. Raises ArtifactRefused."""
    if not os.path.isdir(path):
        problem = "is a file, not the directory of a bundle" if os.path.exists(path) else "does not exist"
        fix = "Check the path, or make a bundle with flexvar export."
        raise ArtifactRefused(f"{os.fspath(path)} {problem}.", expected="the directory of a bundle", fix=fix)
    return Path(path).resolve()


def read_manifest(root: Path) -> bytes:
    """The first bytes of `manifest.json`: one more than a manifest may have. Raises ArtifactRefused."""
    if not os.path.lexists(root / MANIFEST):
        fix = "Pass a directory that flexvar export wrote."
        raise ArtifactRefused(f"{root} has no {MANIFEST}, so it is not a bundle.", expected="a bundle", fix=fix)
    with _refuse_unreadable(MANIFEST):
        _require_regular(MANIFEST, os.lstat(root / MANIFEST).st_mode)
    with _open(root, MANIFEST) as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def inventory(root: Path) -> dict[str, int]:
    """Name and size of every file below `root`, without the manifest and `engines/`.

    Raises ArtifactRefused for links, special files and empty directories.
    """
    found: dict[str, int] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        with _refuse_unreadable(folder or "."), os.scandir(root / folder) as scan:
            entries = list(scan)
        if folder and not entries:
            _refuse(folder, "is an empty directory", "only the files of the manifest", "Remove it.")
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            with _refuse_unreadable(name):
                info = os.lstat(entry.path)
            if not stat.S_ISDIR(info.st_mode):
                _require_regular(name, info.st_mode)
                found[name] = info.st_size
            elif name != ENGINES:
                pending.append(name)
    found.pop(MANIFEST, None)
    return found


def check_listing(root: Path, manifest: Manifest) -> None:
    """Raise ArtifactRefused for files that are missing, unknown or of another size. No file is read."""
    found = inventory(root)
    for name in sorted(found.keys() - manifest.files.keys()):
        _refuse(name, "is not listed in the manifest", "only the files of the manifest", "Remove it.")
    for name, record in manifest.files.items():
        if name not in found:
            _refuse(name, "is missing", f"a file of {record.size} bytes", _COPY_AGAIN)
        if found[name] != record.size:
            expected = f"{record.size} bytes"
            _refuse(name, f"has {found[name]} bytes, but the manifest says {expected}", expected, _COPY_AGAIN)


def hash_files(root: Path, names: Iterable[str], workers: int | None = None) -> dict[str, FileRecord]:
    """Size and sha256 of files below `root`, in the order of `names`. workers: threads; None means up to 8.

    Raises ArtifactRefused, EnvironmentFailed, InvalidInput.
    """
    if workers is not None:
        check_whole("threads", workers, 1, MAX_WORKERS)
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    ordered = list(names)
    workers = min(workers or min(8, default_threads()), len(ordered))
    if workers <= 1:
        return {name: _hash(root, name) for name in ordered}
    try:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return dict(zip(ordered, pool.map(lambda name: _hash(root, name), ordered), strict=True))
    except RuntimeError as error:
        raise cannot_start(workers) from error


def _hash(root: Path, name: str) -> FileRecord:
    with _open(root, name) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


@contextmanager
def _open(root: Path, name: str) -> Iterator[BufferedReader]:
    """Open a regular file. The check is of the opened file, which nobody can exchange any more."""
    with _refuse_unreadable(name), open_unlinked(root / name) as (file, info):
        _require_regular(name, info.st_mode)
        yield file


@contextmanager
def _refuse_unreadable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _refuse(name, f"cannot be read ({error.strerror})", "a readable file", "Check its permissions.")


def _require_regular(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "a special file"
        fix = "Copy the bundle with its links resolved (cp -rL), or export it again."
        _refuse(name, f"is {what}, but it must be a regular file", "a regular file", fix)


def _refuse(name: str, problem: str, expected: str, fix: str) -> NoReturn:
    """Raise the error that the file `name` has a problem, which begins with a verb."""
    shown = name if name.isprintable() else short(name)
    raise ArtifactRefused(f"{shown} {problem}.", expected=expected, fix=fix) from None
