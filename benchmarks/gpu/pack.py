"""All that travels to a GPU machine beside the tracked files, in one folder, and how it is unpacked there.

pack.json              every file with its size and sha256
onnxruntime.tar.xz     onnxruntime-gpu, trimmed; not in a pack for a rehearsal
tiny/                  the bundle of the tiny model and its proof
d16/                   the skeleton of d16
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed, InvalidInput

from ..gpu_check import source_hash
from .files import ModelFiles
from .stages import StageSetup

CONTENTS, ONNXRUNTIME, SITE = "pack.json", "onnxruntime.tar.xz", "site"
MIB = 2**20
MOST_BYTES = 60 * MIB  # of the packed folder and the tracked files; a machine takes 64 MiB
MOST_PACKED_BYTES = 38 * MIB
REMAKE = "make it anew with gpu_check.py --pack DIR"


@dataclass(frozen=True)
class Size:
    """Bytes of what travels."""

    packed: int
    tracked: int

    def __str__(self) -> str:
        return f"{self.packed / MIB:.1f} MiB packed and {self.tracked / MIB:.1f} MiB of tracked files"


def make_pack(folder: Path, setup: StageSetup, work: Path, root: Path, cuobjdump: Path | None = None) -> Size:
    """Write `folder`, which must not exist. root: of the checkout. What lies in `work` from an earlier time is used.

    Raises ArtifactRefused where more than 60 MiB would travel; then no folder is written.
    """
    from .models import export_model, write_only_bundle
    from .skeleton import make_skeleton

    if folder.exists():
        raise InvalidInput(f"--pack {folder}, which exists", expected="a new folder", fix="remove it, or name another")
    tracked = tracked_bytes(root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        for small in setup.carried_bundles:
            export_model(small, work, setup.precision, lambda _: None)
            files, copies = ModelFiles.of(work, small), ModelFiles.of(partial / small, small)
            shutil.copytree(files.bundle, copies.bundle)
            shutil.copy(files.proof, copies.proof)
        model = write_only_bundle(setup.model, work, setup.precision)
        bundle = ModelFiles.of(work, setup.model).bundle
        make_skeleton(bundle, model, skeleton_of(partial, setup.model))
        if not setup.rehearsed:
            shutil.copy(_onnxruntime(work, cuobjdump), partial / ONNXRUNTIME)
        _write_contents(partial, setup)
        size = Size(_bytes_under(partial), tracked)
        require_fit(size)
        partial.rename(folder)
    return size


def skeleton_of(pack: Path, model: str) -> Path:
    return pack / model / "skeleton"


def require_fit(size: Size) -> None:
    """Raises ArtifactRefused, naming the sizes."""
    if size.packed > MOST_PACKED_BYTES or size.packed + size.tracked > MOST_BYTES:
        raise ArtifactRefused(
            str(size),
            expected=f"at most {MOST_PACKED_BYTES / MIB:.0f} MiB packed and {MOST_BYTES / MIB:.0f} MiB together",
            fix="track smaller files, or leave some out",
        )


def tracked_bytes(root: Path) -> int:
    """Of the files that git tracks. Raises EnvironmentFailed outside a git checkout."""
    return sum((root / name).lstat().st_size for name in tracked_files(root))


def tracked_files(root: Path) -> list[str]:
    """Those that are there, relative to `root`."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFailed(
            f"no list of tracked files ({error})", expected="a git checkout", fix="run --pack in a clone, with git"
        ) from error
    return [name for name in listed.split("\0") if name and (root / name).is_symlink() | (root / name).is_file()]


def check_pack(pack: Path, setup: StageSetup) -> None:
    """Raises InvalidInput for a folder that is no pack, or one that was made for something else."""
    try:
        made_for = json.loads((pack / CONTENTS).read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"--carried {pack} ({error})", expected="a packed folder", fix=REMAKE) from error
    if made_for != setup.model:
        tiny = "without --tiny" if setup.rehearsed else "with --tiny"
        raise InvalidInput(
            f"--carried {pack}, packed for {made_for}", expected=f"one for {setup.model}", fix=f"it was made {tiny}"
        )


def unpack(pack: Path, work: Path, bundles: Sequence[str], save: Callable[[dict[str, Any]], None]) -> None:
    """Put ONNX Runtime into `work / SITE` and bundles with their proofs into `work`, what is there already left alone.

    Raises ArtifactRefused for a file that is not the packed one.
    """
    contents = json.loads((pack / CONTENTS).read_text())
    for name, record in contents["files"].items():
        if not (pack / name).is_file() or _sha256(pack / name) != record["sha256"]:
            raise ArtifactRefused(f"{name} with another sha256 than packed", expected="the packed file", fix=REMAKE)
    for model in bundles:
        files, packed = ModelFiles.of(work, model), ModelFiles.of(pack / model, model)
        files.keep_only(source_hash())
        if not files.exist:
            shutil.copytree(packed.bundle, files.bundle, dirs_exist_ok=True)
            shutil.copy(packed.proof, files.proof)
    archive, site = pack / ONNXRUNTIME, work / SITE
    result = {"files": len(contents["files"]), "bundles": list(bundles), "onnxruntime": archive.is_file()}
    if archive.is_file() and not site.exists():
        with tempfile.TemporaryDirectory(prefix=f".{SITE}-", dir=work) as temporary:
            with tarfile.open(archive, "r:xz") as tar:
                tar.extractall(Path(temporary) / SITE, filter="data")
            (Path(temporary) / SITE).rename(site)
    save(result)


def _onnxruntime(work: Path, cuobjdump: Path | None) -> Path:
    """The archive of this version, made once for a folder."""
    from .trim_onnxruntime import VERSION, trim_onnxruntime

    archive = work / f"onnxruntime-{VERSION}.tar.xz"
    if not archive.is_file():
        trim_onnxruntime(archive, cuobjdump=cuobjdump)
    return archive


def _write_contents(folder: Path, setup: StageSetup) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        str(path.relative_to(folder)): {"size_bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    facts = {"model": setup.model, "precision": setup.precision, "files": files}
    (folder / CONTENTS).write_text(json.dumps(facts, indent=1) + "\n")


def _bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
