"""A small bundle whose content means nothing (the checks never look inside a file), and machines that lack things."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_runtime.bundle.manifest import Defaults, Manifest, ParityRecord, ParityRow, Provenance, Range
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import SCHEMA_VERSION
from flexvar_runtime.model.tensors import GraphSpec, TensorSpec

FILES = {
    "step.onnx": b"step" * 1000,
    "decoder.onnx": b"decoder",
    "tables.npz": b"tables" * 100,
    "weights/step.bin": bytes(range(256)) * 9000,
    "weights/empty.bin": b"",
}


@pytest.fixture
def manifest() -> Manifest:
    """Facts of a tiny model, not sealed: no files yet."""
    codes = TensorSpec(name="codes", dtype="float32", axes=("N", "L", 8))
    logits = TensorSpec(name="logits", dtype="float32", axes=("B", "L", 64))
    image = TensorSpec(name="image", dtype="float32", axes=("B", 3, "H", "W"))
    row = ParityRow(graph="step", scale="3x5", output="logits", metric="relative error", value=3e-6, bound=1e-5)
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
        parity=ParityRecord(backend="ort-cpu", emulated=False, passed=True, rows=(row,), free_running_agreement=None),
        largest_activation={"step": Range(value=12.5, where="blocks.1.mlp")},
        files={},
    )


@pytest.fixture
def bundle_dir(tmp_path: Path, manifest: Manifest) -> Path:
    """A sealed bundle on disk, with a file in a sub-directory and an empty one."""
    with write_bundle(tmp_path / "tiny.bundle") as directory:
        for name, content in FILES.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        seal(directory, manifest)
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


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that these wheels are installed (in `folders`), and that importing onnxruntime gives `module` or raises
    it. There is no openvino then."""

    def pretend(*wheels: str, module: str | Exception | None = "1.31.1", folders: tuple[str, ...] = ()) -> None:
        def distribution(name: str) -> Any:
            if name not in wheels:
                raise importlib.metadata.PackageNotFoundError(name)
            folder = folders[wheels.index(name)] if folders else "/site"
            return types.SimpleNamespace(version="1.31.1", locate_file=lambda _: folder)

        def load(name: str, package: str | None = None) -> Any:
            if name == "openvino":
                raise ModuleNotFoundError("No module named 'openvino'")
            if name != "onnxruntime":
                return real(name, package)
            if isinstance(module, Exception):
                raise module
            found = types.ModuleType(name)
            if module is not None:
                found.__version__ = module  # type: ignore[attr-defined]
            return found

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        monkeypatch.setattr(importlib, "import_module", load)

    real = importlib.import_module
    return pretend
