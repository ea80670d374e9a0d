"""Makes and unpacks the folder that travels to a GPU machine beside the tracked files. It holds:

pack.json              size and sha256 of every file
onnxruntime.tar.xz     onnxruntime-gpu, trimmed
libraries.tar.xz       the Python modules of cuBLASLt and cuDNN
tiny-fp16/             the bundle of the tiny model in float16 and its proof
tiny-bf16/             the same in bfloat16
d16/                   the skeleton of d16, in float16

A pack for a rehearsal holds only the skeleton of the tiny model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed, InvalidInput
from flexvar_runtime.files.temporary import remove_leftovers, temporary

from .files import ModelFiles, carried_folder
from .plan import TINY
from .sources import source_hash
from .stages import StageSetup
from .trim_onnxruntime import VERSION, find_cuobjdump, require_tools, trim_onnxruntime
from .wheels import libraries_name, pack_libraries

CONTENTS, ONNXRUNTIME, LIBRARIES, SITE = "pack.json", "onnxruntime.tar.xz", "libraries.tar.xz", "site"
MIB = 2**20
MOST_BYTES = 62 * MIB  # of the packed folder and the tracked files together; an upload takes 64 MiB
MOST_PACKED_BYTES = 46 * MIB
REMAKE = "Make the folder again with gpu_check.py --pack DIR."


@dataclass(frozen=True)
class Size:
    """The bytes of the packed folder, and of the files that git tracks."""

    packed: int
    tracked: int

    def __str__(self) -> str:
        return f"{self.packed / MIB:.1f} MiB packed and {self.tracked / MIB:.1f} MiB of tracked files"


def make_pack(folder: Path, setup: StageSetup, work: Path, root: Path, cuobjdump: Path | None = None) -> Size:
    """Write the new folder `folder`, with files that the same sources have made in `work` before. Returns its size.

    root: folder of the checkout. cuobjdump: NVIDIA's tool; it is looked for if None.

    Raises InvalidInput if `folder` exists, and EnvironmentFailed for a missing tool, before anything is exported.
    Raises ArtifactRefused if the folder is larger than 46 MiB, or if the folder and the tracked files are larger than
    62 MiB together. Then no folder is written.
    """
    from .random_models import export_model, write_only_bundle
    from .skeleton import make_skeleton

    if folder.exists():
        raise InvalidInput(
            f"--pack {folder} exists already.", expected="a new folder", fix="Remove it, or name a new folder."
        )
    if not setup.rehearsed and not _archive(work).is_file():
        cuobjdump = find_cuobjdump(cuobjdump)
        require_tools()
    tracked = tracked_bytes(root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with temporary(folder, directory=True) as partial:
        for precision in setup.carried_bundles:
            made, folder_there = (place / carried_folder(precision) for place in (work, partial))
            made.mkdir(parents=True, exist_ok=True)
            export_model(TINY, made, precision, lambda _: None)
            _copy_model(made, folder_there)
        model = write_only_bundle(setup.model, work, setup.precision)
        bundle = ModelFiles.of(work, setup.model).bundle
        make_skeleton(bundle, model, skeleton_of(partial, setup.model))
        if not setup.rehearsed:
            shutil.copy(_onnxruntime(work, cuobjdump), partial / ONNXRUNTIME)
            shutil.copy(_libraries(work), partial / LIBRARIES)
        _write_contents(partial, setup)
        size = Size(_bytes_under(partial), tracked)
        require_fit(size)
        partial.rename(folder)
    return size


def skeleton_of(pack: Path, model: str) -> Path:
    return pack / model / "skeleton"


def require_fit(size: Size) -> None:
    """Raises ArtifactRefused for more than 46 MiB packed, or more than 62 MiB together. It names the exceeded limit."""
    packed, together = f"{MOST_PACKED_BYTES / MIB:.0f} MiB packed", f"{MOST_BYTES / MIB:.0f} MiB together"
    if size.packed > MOST_PACKED_BYTES:
        exceeded, fix = packed, "Leave something out of the packed folder."
    elif size.packed + size.tracked > MOST_BYTES:
        exceeded, fix = together, "Track smaller files, or leave something out of the packed folder."
    else:
        return
    raise ArtifactRefused(
        f"There are {size}. This exceeds the limit of {exceeded}.", expected=f"at most {packed} and {together}", fix=fix
    )


def tracked_bytes(root: Path) -> int:
    """The bytes of all files that git tracks. Raises EnvironmentFailed outside a git checkout."""
    return sum((root / name).lstat().st_size for name in tracked_files(root))


def tracked_files(root: Path) -> list[str]:
    """The names of the tracked files that exist, relative to `root`. Raises EnvironmentFailed outside a checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentFailed(
            f"git cannot list the tracked files of {root} ({error}).",
            expected="a git checkout",
            fix="Run --pack in a git clone.",
        ) from error
    return [name for name in listed.split("\0") if name and (root / name).is_symlink() | (root / name).is_file()]


def check_pack(pack: Path, setup: StageSetup) -> None:
    """Raises InvalidInput for a folder that --pack did not make, or that it made for another model."""
    try:
        made_for = json.loads((pack / CONTENTS).read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"--carried {pack} is not a packed folder ({error}).",
            expected="a packed folder",
            fix="Make one with --pack DIR.",
        ) from error
    if made_for == setup.model:
        return
    if setup.rehearsed:
        raise InvalidInput(
            f"--carried {pack} was packed for {made_for}, but --tiny needs a pack of the tiny model.",
            expected="a pack of the tiny model",
            fix="Leave out --tiny, or make another folder with --pack DIR --tiny.",
        )
    raise InvalidInput(
        f"--carried {pack} was packed for the {made_for} model, but without --tiny it must be a pack of {setup.model}.",
        expected=f"a pack of {setup.model}",
        fix="Add --tiny, or make another folder with --pack DIR.",
    )


def unpack(pack: Path, work: Path, precisions: Sequence[str], save: Callable[[dict[str, Any]], None]) -> None:
    """Put packages into `work / SITE`, and the tiny model of each precision with its proof into a folder of `work`.

    Packages that are there stay, and so do bundles that these sources made. Raises ArtifactRefused for a file that is
    not the packed one.
    """
    contents = json.loads((pack / CONTENTS).read_text())
    for name, record in contents["files"].items():
        if not (pack / name).is_file() or _sha256(pack / name) != record["sha256"]:
            raise ArtifactRefused(
                f"{pack / name} has another sha256 than {CONTENTS} says.", expected="the packed file", fix=REMAKE
            )
    for precision in precisions:
        packed, there = (place / carried_folder(precision) for place in (pack, work))
        there.mkdir(parents=True, exist_ok=True)
        files = ModelFiles.of(there, TINY)
        files.keep_only(source_hash())
        if not files.exist:
            _copy_model(packed, there)
    archives, site = [pack / name for name in (ONNXRUNTIME, LIBRARIES) if (pack / name).is_file()], work / SITE
    result = {"files": len(contents["files"]), "bundles": list(precisions), "archives": [one.name for one in archives]}
    if archives and not site.exists():
        remove_leftovers(work)
        with temporary(site, directory=True) as partial:
            for archive in archives:
                with tarfile.open(archive, "r:xz") as tar:
                    tar.extractall(partial, filter="data")
            partial.rename(site)
    save(result)


def _copy_model(source: Path, target: Path) -> None:
    """Copy the bundle and the proof of the tiny model from one folder to another."""
    files, copies = ModelFiles.of(source, TINY), ModelFiles.of(target, TINY)
    shutil.copytree(files.bundle, copies.bundle, dirs_exist_ok=True)
    shutil.copy(files.proof, copies.proof)


def _onnxruntime(work: Path, cuobjdump: Path | None) -> Path:
    """The archive of trimmed onnxruntime-gpu in `work`. It is made if it is not there."""
    archive = _archive(work)
    if not archive.is_file():
        trim_onnxruntime(archive, cuobjdump=cuobjdump)
    return archive


def _libraries(work: Path) -> Path:
    """The archive of Python modules in `work`. It is made if it is not there."""
    archive = work / libraries_name()
    if not archive.is_file():
        pack_libraries(archive)
    return archive


def _archive(work: Path) -> Path:
    return work / f"onnxruntime-{VERSION}.tar.xz"


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
