"""Opening a bundle: every file is checked against the manifest before its content is parsed.

The cheap checks come first: manifest, names, links and sizes. Then comes the sha256 of every file. The only parser that
sees unchecked bytes is the strict JSON parser of the manifest. Last, every graph is scanned (`graph_rules.py`), so
that a library reads no graph that could harm. The files stay open, so that a bundle that is replaced or edited later is
refused when it is read again (`checked_files.py`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from ..checks import check_path, check_text, check_whole, short
from ..errors import ArtifactRefused
from ..files.directories import restore_directory
from ..files.private import open_unlinked
from ..machine.processors import default_threads
from ..machine.threads import cannot_start
from ..model.signatures import WEIGHTS_OF
from ..model.tensors import GraphSpec
from .certificate import check_certificate
from .checked_files import CheckedFiles
from .graph_rules import check_graph
from .manifest import ENGINES, MANIFEST, MAX_MANIFEST_BYTES, UNLISTED, FileRecord, Manifest
from .onnx_scan import Scan

MAX_WORKERS = 1024
_COPY_AGAIN = "Copy the whole bundle again, or export it again."
_EXPORT_AGAIN = "Export the bundle again."


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A checked bundle. sha256: hash of `manifest.json`, which has the hashes of all other files.

    files: the checked files, open until `close`; None if this process wrote the bundle just now.
    """

    path: Path
    manifest: Manifest
    sha256: str
    files: CheckedFiles | None = field(default=None, compare=False, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, workers: int | None = None, allow_unproved: bool = False) -> Bundle:
        """Check a bundle and open it.

        workers: threads that hash files. allow_unproved: only warn if the parity record of the bundle failed, is
        missing or is of other files. Raises ArtifactRefused, InvalidInput.
        """
        root = bundle_root(check_path("The path of the bundle", path))
        data = read_manifest(root)
        manifest = Manifest.from_bytes(data)
        check_listing(root, manifest)
        check_certificate(manifest, allow_unproved=allow_unproved)
        files = CheckedFiles(root)
        for name, record in _hash_files(root, manifest.files, workers, files).items():
            expected = manifest.files[name]
            if record != expected:
                _refuse(name, "does not match its sha256 in the manifest", f"sha256 {expected.sha256}", _COPY_AGAIN)
        bundle = cls(path=root, manifest=manifest, sha256=hashlib.sha256(data).hexdigest(), files=files)
        for name in manifest.graphs:
            bundle.scan(name)
        return bundle

    def close(self) -> None:
        """Close the files. Nothing can be read from the bundle afterwards."""
        if self.files is not None:
            self.files.close()

    def unchanged(self) -> AbstractContextManager[None]:
        """In the body, files of the bundle may be opened by path: see `CheckedFiles.unchanged`."""
        return nullcontext() if self.files is None else self.files.unchanged()

    def require_unedited(self) -> None:
        """Raise ArtifactRefused if the content of a file has changed since it was checked."""
        if self.files is not None:
            self.files.require_unedited()

    def file(self, name: str) -> Path:
        """The path of a file of the manifest. Raises ArtifactRefused for any other name."""
        if check_text("The name of the file", name) not in self.manifest.files:
            known = f"one of {', '.join(self.manifest.files)}"
            _refuse(name, f"must be a file of the bundle: {known}", known, _EXPORT_AGAIN)
        return self.path / name

    def graph(self, name: str) -> GraphSpec:
        """Inputs and outputs of a graph. Raises ArtifactRefused if the bundle has no such graph."""
        if check_text("The name of the graph", name) not in self.manifest.graphs:
            known = f"one of {', '.join(self.manifest.graphs)}"
            _refuse(name, f"must be a graph of the bundle: {known}", known, _EXPORT_AGAIN)
        return self.manifest.graphs[name]

    def graph_files(self, name: str) -> tuple[str, ...]:
        """The files of a graph: itself, and its weights, which may be those of another graph."""
        file, files = self.graph(name).file, self.manifest.files
        owner = name if f"{file}.data" in files else WEIGHTS_OF.get(name, name)
        return tuple(each for each in (file, f"{self.graph(owner).file}.data") if each in files)

    def graph_file(self, name: str) -> Path:
        """The path of a graph. Raises ArtifactRefused if the bundle has no such graph."""
        return self.file(self.graph(name).file)

    def scan(self, name: str) -> Scan:
        """Read a graph without a library, and check that a library can read it safely. Raises ArtifactRefused."""
        weights = {each: self.manifest.files[each].size for each in self.graph_files(name)}
        with self.unchanged():
            return check_graph(self.graph_file(name), self.graph(name), weights, self.manifest.model.depth)


def bundle_root(path: str | os.PathLike[str]) -> Path:
    """The real directory of a bundle, with the links in `path` resolved. Raises ArtifactRefused.

    A bundle whose replacement was interrupted is found, too.
    """
    root = Path(os.path.realpath(path))
    if not os.path.isdir(root):
        root = restore_directory(root)
    if not os.path.isdir(root):
        problem = "is a file, not the directory of a bundle" if os.path.exists(path) else "does not exist"
        fix = "Check the path, or make a bundle with flexvar export."
        raise ArtifactRefused(f"{os.fspath(path)} {problem}.", expected="the directory of a bundle", fix=fix)
    return root


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
    """Name and size of every file below `root`, without the manifest, `engines/` and the files of `UNLISTED`.

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
    return {name: size for name, size in found.items() if name not in (MANIFEST, *UNLISTED)}


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
    with closing(CheckedFiles(root)) as files:
        return _hash_files(root, names, workers, files)


def _hash_files(root: Path, names: Iterable[str], workers: int | None, files: CheckedFiles) -> dict[str, FileRecord]:
    if workers is not None:
        check_whole("threads", workers, 1, MAX_WORKERS)
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    def hashed(name: str) -> FileRecord:
        with _open(root, name) as file:
            return files.hash(name, file)

    ordered = list(names)
    workers = min(workers or min(8, default_threads()), len(ordered))
    if workers <= 1:
        return {name: hashed(name) for name in ordered}
    try:
        with ThreadPoolExecutor(max_workers=workers) as pool:
            return dict(zip(ordered, pool.map(hashed, ordered), strict=True))
    except RuntimeError as error:
        raise cannot_start(workers) from error


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
