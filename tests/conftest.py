"""Checkpoints and bundles shared by all tests, made once a session."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from graph_cache import GraphCache

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

# Files that take longest, in two rows for two workers, so that neither ends with one of them alone. The tiny bundles
# are made in the first row, in the first of its files, while the second is at what needs none of them.
LONGEST = (
    ("runtime/backends/test_openvino.py", "e2e/test_readme.py", "export/test_build_command.py", "e2e/test_demo.py"),
    ("e2e/test_golden.py", "flexvar_ref/training/test_train_runs.py", "flexvar_ref/test_golden.py"),
)


def pytest_configure() -> None:
    """A processor of its own for every worker and what it starts: graphs of the tests' size gain nothing from a second
    thread, and what spins while it waits takes the time of both. Interrupts arrive."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by what is started too
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each row at the beginning of its half: a worker starts with one half and takes from the other's end."""
    rows = [[item for name in row for item in items if item.path == TESTS / name] for row in LONGEST]
    long = {*rows[0], *rows[1]}
    others = [item for item in items if item not in long]
    half = max(0, len(items) // 2 - len(rows[0]))
    items[:] = [*rows[0], *others[:half], *rows[1], *others[half:]]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the recordings of the published implementation."""
    return GOLDEN


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
    from graph_cache import locked

    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    folder = shared_folder / "checkpoint"
    with locked(shared_folder / "checkpoint.lock"):
        if not folder.exists():
            folder.mkdir()
            return write_checkpoints(folder, tiny_transformer(), TINY_TOKENIZER)
    return folder / "transformer.pth", folder / "vae.pth"


@pytest.fixture(scope="session")
def graph_cache(shared_folder: Path) -> GraphCache:
    """What exports graphs for the tests whose subject is another: each form of graph once a run."""
    from graph_cache import GraphCache

    folder = shared_folder / "graphs"
    folder.mkdir(exist_ok=True)
    return GraphCache(folder)


@pytest.fixture
def cached_exports(graph_cache: GraphCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test, and of the processes it starts, take their graphs from there."""
    from flexvar_export import bundle as exporter

    monkeypatch.setattr(exporter, "export_graph", graph_cache.export_graph)
    for name, value in graph_cache.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def tiny_bundles(
    tiny_checkpoint: tuple[Path, Path], graph_cache: GraphCache, shared_folder: Path
) -> Callable[[str], Path]:
    """precision -> a bundle of the tiny model, exported and proved when a worker first asks for it. Read-only."""
    from graph_cache import locked

    from flexvar_export import bundle as exporter

    def bundle(precision: str) -> Path:
        path = shared_folder / precision
        with locked(shared_folder / f"{precision}.lock"):
            if not path.exists():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(exporter, "export_graph", graph_cache.export_graph)
                    exporter.export_bundle(*tiny_checkpoint, path, precision=precision)
        return path

    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundles: Callable[[str], Path]) -> Path:
    """The fp32 bundle of the tiny model. Read-only: see `bundle_copy`."""
    return tiny_bundles("fp32")


@pytest.fixture(scope="session")
def ordered_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Sequence[str]], Path]:
    """(default schedule, quality order) -> a bundle of the tiny model that has them."""
    from flexvar_runtime.bundle.manifest import MANIFEST, Manifest

    def bundle(schedule: str, order: Sequence[str]) -> Path:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("ordered") / "bundle"))
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes())
        defaults = replace(manifest.defaults, schedule=schedule, quality_order=tuple(order))
        (folder / MANIFEST).write_bytes(replace(manifest, defaults=defaults).to_bytes())
        return folder

    return bundle


@pytest.fixture(scope="session")
def schema1_bundle() -> Path:
    """An fp32 bundle of schema version 1, as it was exported at commit a8c13d3: random weights, depth 2, width 32, 64
    codes, 4 classes, 2 pixels a token side, group normalisation as InstanceNormalization. Read-only."""
    return GOLDEN / "schema1"


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fp32 bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy.bundle"))
