"""Fixtures of the tests of the exporter: the tiny model as torch modules, its proof, and bundles to change."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

import flexvar_ref
from flexvar_export import bundle as exporter
from flexvar_export.bundle_writer import seal
from flexvar_export.engine_profiles import profiles
from flexvar_export.proof import PROOF_FILE, Proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.backends.tensorrt.engine_files import PORTABLE, RECIPE, EngineId, graph_sha256
from flexvar_runtime.backends.tensorrt.library import TrtLibrary, load
from flexvar_runtime.model.signatures import WEIGHTS_OF
from flexvar_runtime.model.tensors import TensorSpec

Pair = tuple[FlexVAR, Tokenizer]
Edit = Callable[[onnx.ModelProto], None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Run torch on one thread. The tiny model gains nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_pair(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    """The reference of the tiny bundles. It is shared: copy it before changing it."""
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_proof(tiny_bundle: Path) -> Proof:
    """The proof in the tiny bundles. It is the same for every precision."""
    return Proof.load(tiny_bundle / PROOF_FILE)


@pytest.fixture
def spoil(tiny_bundles: Callable[[str], Path], tmp_path: Path) -> Callable[..., Bundle]:
    """(graph, edit, precision="fp32") -> a sealed copy of a tiny bundle with an edited graph or edited weights."""

    def edited(graph: str, edit: Edit, precision: str = "fp32") -> Bundle:
        path = tmp_path / f"spoiled{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_bundles(precision), path)
        manifest = Bundle.open(path).manifest
        file = path / manifest.graphs[graph].file
        model = onnx.load(str(file))
        edit(model)
        if graph not in WEIGHTS_OF.values():  # another graph uses this file of weights
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        onnx.save_model(model, str(file))
        return seal(path, manifest)

    return edited


@pytest.fixture(scope="session")
def library() -> TrtLibrary:
    """TensorRT-RTX, which builds engines without a GPU."""
    return load("tensorrt-rtx")


@pytest.fixture(scope="session")
def engine_id(library: TrtLibrary) -> Callable[..., EngineId]:
    """(bundle, graph, schedules, max_batch, target, library) -> the id of an engine to build."""
    rtx = library

    def make(
        bundle: Bundle,
        graph: str,
        schedules: Sequence[ScaleSchedule] = (ScaleSchedule.parse("1_2x3"),),
        max_batch: int = 2,
        target: str = PORTABLE,
        library: TrtLibrary = rtx,
    ) -> EngineId:
        return EngineId(
            graph=graph,
            graph_sha256=graph_sha256(bundle, graph),
            recipe=RECIPE,
            flavour=library.flavour,
            version=library.version,
            target=target,
            profiles=profiles(graph, schedules, max_batch, bundle.manifest.model),
        )

    return make


@pytest.fixture(scope="session")
def same_files() -> Callable[[Bundle, Bundle], None]:
    """Assert that two bundles hold the same bytes, except for float32 noise in the recorded proof.

    The noise appears where the reference ran on another number of threads. Tokens are equal.
    """

    def check(got: Bundle, expected: Bundle) -> None:
        files, others = dict(got.manifest.files), dict(expected.manifest.files)
        if files.pop(PROOF_FILE) != others.pop(PROOF_FILE):
            ours, theirs = (np.load(bundle.file(PROOF_FILE)) for bundle in (got, expected))
            assert ours.files == theirs.files
            for name in ours.files:
                assert ours[name].dtype == theirs[name].dtype
                assert np.allclose(ours[name], theirs[name], rtol=0, atol=1e-3 if ours[name].dtype.kind == "f" else 0)
        assert files == others

    return check


@pytest.fixture(scope="session")
def arrays_for() -> Callable[..., dict[str, NDArray[Any]]]:
    """(inputs, sizes of the named axes, largest integer, seed) -> an array for every input.

    bfloat16 inputs are float32 arrays of bfloat16 values. With two sequences per image, the first half is conditional.
    """

    def make(
        inputs: tuple[TensorSpec, ...], sizes: dict[str, int], largest: int = 8, seed: int = 0
    ) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(seed)

        def one(tensor: TensorSpec) -> NDArray[Any]:
            shape = [
                a if isinstance(a, int) else sizes[a.split("_x")[0]] * int((a + "_x1").split("_x")[1])
                for a in tensor.axes
            ]
            if tensor.name == "cond_rows":
                return np.arange(sizes["images"], dtype=np.int32)
            if tensor.name == "uncond_rows":
                return np.arange(sizes["images"], dtype=np.int32) + np.int32(sizes["sequences"] - sizes["images"])
            if tensor.dtype == "int32":
                return rng.integers(0, largest, shape, dtype=np.int32)
            values = rng.standard_normal(shape, dtype=np.float32)
            if tensor.name.startswith("past_"):  # as a graph of that precision returns them
                return values.astype(np.float16) if tensor.dtype == "float16" else _bf16(values)
            return values

        return {tensor.name: one(tensor) for tensor in inputs}

    return make


def _bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.fixture
def quick_export(
    cached_exports: None,
    tiny_proof: Proof,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Make exports of the tiny model fast: use cached graphs, and the proof and activations of the tiny bundle."""
    largest = Bundle.open(tiny_bundle).manifest.largest_activation
    monkeypatch.setattr(exporter, "make_proof", lambda *_: tiny_proof)
    monkeypatch.setattr(exporter, "largest_activations", lambda *_: largest)


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `flexvar …` in this process: exit code, standard output, standard error."""
    from flexvar_runtime.cli.main import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return int(ended.value.code or 0), streams.out, streams.err

    return run
