"""Checkpoints and bundles shared by all tests, made once a session."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from graph_cache import GraphCache

    from flexvar_runtime import Bundle
    from flexvar_runtime.bundle.manifest import Manifest

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"

FILES = {
    "tables.npz": b"tables" * 100,
    "weights/step.bin": bytes(range(256)) * 9000,
    "weights/empty.bin": b"",
}

# Files that take longest, in two rows for two workers, so that neither ends with one of them alone. The tiny bundles
# are made in the first row, in the first of its files, while the second is at what needs none of them.
LONGEST = (
    ("runtime/backends/test_openvino.py", "e2e/test_readme.py", "export/test_build_command.py", "e2e/test_demo.py"),
    ("e2e/test_golden.py", "flexvar_ref/training/test_train_runs.py", "flexvar_ref/test_golden.py"),
)


def pytest_configure() -> None:
    """A processor of its own for every worker and what it starts: graphs of the tests' size gain nothing from a second
    thread, and what spins while it waits takes the time of both. Interrupts arrive. Nothing sends telemetry."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # many tests import onnxruntime themselves
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


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip the test files that import torch or onnx where these are not installed (see `make test-lowest`)."""
    report = yield
    lacks = re.search(r"No module named '(onnx|torch)'", str(report.longrepr)) if report.outcome == "failed" else None
    if lacks is not None and find_spec(lacks[1]) is None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {lacks[1]} is not installed")
    return report


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
    pytest.importorskip("torch")
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
    pytest.importorskip("onnx")
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
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """The fp32 bundle of the tiny model. Read-only: see `bundle_copy`.

    The environment variable FLEXVAR_TEST_BUNDLE names one that was made before, for an environment without torch.
    """
    made = os.environ.get("FLEXVAR_TEST_BUNDLE")
    return Path(made) if made else request.getfixturevalue("tiny_bundles")("fp32")


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


@pytest.fixture
def manifest() -> Manifest:
    """Facts of a tiny model, not sealed: no files yet."""
    from flexvar_runtime.bundle.manifest import Defaults, Manifest, ParityRecord, ParityRow, Provenance, Range
    from flexvar_runtime.model.facts import ModelFacts
    from flexvar_runtime.model.signatures import SCHEMA_VERSION
    from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

    codes = TensorSpec(name="codes", dtype="float32", axes=("N", "L", 8))
    logits = TensorSpec(name="logits", dtype="float32", axes=("B", "L", 64))
    image = TensorSpec(name="image", dtype="float32", axes=("B", 3, "H", "W"))
    rows = (
        ParityRow(graph="step", scale="3/3 (3x5)", output="logits", metric="relative_error", value=3e-6, bound=1e-5),
        ParityRow(graph="decoder", scale="3x5", output="image", metric="psnr_db", value=120.0, bound=80.0),
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        precision="fp32",
        model=ModelFacts(
            depth=2,
            width=128,
            heads=2,
            head_size=64,
            classes=3,
            class_names=("cat", "crème brûlée", "volcano"),
            null_class=3,
            vocabulary=64,
            code_dim=8,
            downsampling=4,
            value_range=(-1.0, 1.0),
            position_side=8,
        ),
        graphs={
            "step": GraphSpec(file="step.onnx", inputs=(codes,), outputs=(logits,)),
            "decoder": GraphSpec(file="decoder.onnx", inputs=(codes,), outputs=(image,)),
        },
        defaults=Defaults(
            schedule="1_2_3x5",
            guidance_scale=2.5,
            guidance_rule="ramp",
            top_k=900,
            top_p=0.95,
            greedy_scales="upstream",
            max_side=16,
        ),
        provenance=Provenance(transformer_sha256="0" * 64, tokenizer_sha256="f" * 64, tools={"torch": "2.13.0+cpu"}),
        parity=ParityRecord(backend="ort-cpu", emulated=False, passed=True, rows=rows, free_running_agreement=None),
        largest_activation={"step": Range(value=12.5, where="blocks.1.mlp")},
        files={},
    )


@pytest.fixture(scope="session")
def seal_proved() -> Callable[[Path, Manifest], Bundle]:
    """(folder, manifest) -> the sealed bundle. Its parity record names the files that are in the folder now."""
    from flexvar_export.bundle_writer import seal
    from flexvar_runtime.bundle.certificate import compared_files

    def sealed(folder: Path, manifest: Manifest) -> Bundle:
        files = compared_files(seal(folder, manifest).manifest)
        return seal(folder, replace(manifest, parity=replace(manifest.parity, files=files)))

    return sealed


@pytest.fixture
def bundle_dir(tmp_path: Path, manifest: Manifest, seal_proved: Callable[[Path, Manifest], Bundle]) -> Path:
    """A sealed bundle on disk whose graphs do nothing, with a file in a sub-directory and an empty one."""
    from onnx_bytes import plain_graph

    from flexvar_export.bundle_writer import write_bundle

    with write_bundle(tmp_path / "tiny.bundle") as directory:
        graphs = {spec.file: plain_graph(spec) for spec in manifest.graphs.values()}
        for name, content in (FILES | graphs).items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        seal_proved(directory, manifest)
    return tmp_path / "tiny.bundle"


@pytest.fixture
def edit_manifest(bundle_dir: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Apply a function to the parsed `manifest.json` of `bundle_dir` and write the result back."""

    def edit(change: Callable[[dict[str, Any]], object]) -> None:
        path = bundle_dir / "manifest.json"
        document = json.loads(path.read_bytes())
        change(document)
        path.write_text(json.dumps(document))

    return edit
