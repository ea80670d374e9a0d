"""Checkpoints and bundles shared by all tests, made once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the recordings of the published implementation."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """transformer.pth and vae.pth of the tiny model, in the published layouts."""
    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    return write_checkpoints(tmp_path_factory.mktemp("tiny"), tiny_transformer(), TINY_TOKENIZER)


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> a bundle of the tiny model, exported and proved when first asked for. Read-only."""
    from flexvar_export.bundle import export_bundle

    root = tmp_path_factory.mktemp("bundles")

    def bundle(precision: str) -> Path:
        path = root / precision
        if not path.exists():
            export_bundle(*tiny_checkpoint, path, precision=precision)
        return path

    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: Callable[[str], Path]) -> Path:
    """The fp32 bundle of the tiny model. Read-only: see `bundle_copy`."""
    return tiny_bundles("fp32")


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fp32 bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))
