"""What the tests of the exporter share: the tiny model as torch modules, its proof, and bundles to spoil."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
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
from flexvar_export.proof import PROOF_FILE, Proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle
from flexvar_runtime.model.signatures import WEIGHTS_OF
from flexvar_runtime.model.tensors import TensorSpec

Pair = tuple[FlexVAR, Tokenizer]
Edit = Callable[[onnx.ModelProto], None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """One thread for torch: the tiny model gains nothing from more, which lose much where processors are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_pair(tiny_checkpoint: tuple[Path, Path]) -> Pair:
    """The reference behind the tiny bundles. Shared: copy before changing."""
    return flexvar_ref.load(*tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_proof(tiny_bundle: Path) -> Proof:
    """The proof that travels in the tiny bundles: the reference knows no precision, so it is the same in all."""
    return Proof.load(tiny_bundle / PROOF_FILE)


@pytest.fixture
def spoil(tiny_bundles: Callable[[str], Path], tmp_path: Path) -> Callable[..., Bundle]:
    """(graph, edit, precision="fp32") -> a sealed copy of a tiny bundle whose graph was edited, weights and all."""

    def edited(graph: str, edit: Edit, precision: str = "fp32") -> Bundle:
        path = tmp_path / f"spoiled{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_bundles(precision), path)
        manifest = Bundle.open(path).manifest
        file = path / manifest.graphs[graph].file
        model = onnx.load(str(file))
        edit(model)
        if graph not in WEIGHTS_OF.values():  # another graph has its weights there
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        onnx.save_model(model, str(file))
        return seal(path, manifest)

    return edited


@pytest.fixture(scope="session")
def same_files() -> Callable[[Bundle, Bundle], None]:
    """Assert that two bundles hold the same bytes. The recorded proof may differ where the reference ran on another
    number of threads, which sum in another order: that much is float32 noise, and no token."""

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
    """(inputs, sizes of the named axes, labels, vocabulary) -> an array for every input; bfloat16 as float32 that holds
    such values. Half of the sequences are conditional where there are two for every image."""

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
            if tensor.name.startswith("past_"):  # as they come from a graph of that precision
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
    """Exporting the tiny model in fp32 takes a second: its graphs, proof and activations are at hand."""
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
