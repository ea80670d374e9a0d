"""Checkpoints and bundles shared by all tests, made once a session."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the recordings of the published implementation."""
    return GOLDEN


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run alone and of all its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(shared_folder: Path) -> tuple[Path, Path]:
    """transformer.pth and vae.pth of the tiny model, in the published layouts. Read-only."""
    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    folder = shared_folder / "checkpoint"
    with locked(shared_folder / "checkpoint.lock"):
        if not folder.exists():
            folder.mkdir()
            return write_checkpoints(folder, tiny_transformer(), TINY_TOKENIZER)
    return folder / "transformer.pth", folder / "vae.pth"


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: tuple[Path, Path], shared_folder: Path) -> Callable[[str], Path]:
    """precision -> a bundle of the tiny model, exported and proved when a worker first asks for it. Read-only."""
    from flexvar_export.bundle import export_bundle

    def bundle(precision: str) -> Path:
        path = shared_folder / precision
        with locked(shared_folder / f"{precision}.lock"):
            if not path.exists():
                export_bundle(*tiny_checkpoint, path, precision=precision)
        return path

    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: Callable[[str], Path]) -> Path:
    """The fp32 bundle of the tiny model. Read-only: see `bundle_copy`."""
    return tiny_bundles("fp32")


@pytest.fixture(scope="session")
def ordered_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Sequence[str]], Path]:
    """(default schedule, quality order) -> a bundle of the tiny model that has them."""
    from flexvar_runtime.manifest import MANIFEST, Manifest

    def bundle(schedule: str, order: Sequence[str]) -> Path:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("ordered") / "bundle"))
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes())
        defaults = replace(manifest.defaults, schedule=schedule, quality_order=tuple(order))
        (folder / MANIFEST).write_bytes(replace(manifest, defaults=defaults).to_bytes())
        return folder

    return bundle


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fp32 bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))
