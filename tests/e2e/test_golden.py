"""From a checkpoint to images on the command line, compared with recordings of the published implementation."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import flexvar_ref
from flexvar_export.bundle import UNPROVEN
from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts, tables
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import export_graph
from flexvar_ref import TokenizerConfig, TransformerConfig
from flexvar_ref.synthetic import write_checkpoints
from flexvar_runtime import FlexVARPipeline, Guidance, ScaleSchedule
from flexvar_runtime.bundle.manifest import PHASES, Manifest, Provenance
from flexvar_runtime.model.signatures import REQUIRED, SCHEMA_VERSION, TABLES_FILE, graph_specs
from flexvar_runtime.pictures.pixels import to_uint8
from flexvar_runtime.request import Request

FLEXVAR = Path(sys.executable).with_name("flexvar")
RULES = {"var": "ramp", "llamagen": "constant"}
IMAGE = 1e-2  # half a step of the recorded float16 at 3.35 is 1e-3; the rest is the decoder in float32

pytestmark = pytest.mark.timeout(600)  # an export of the published tokenizer takes most of a minute

# A recording, and whether `flexvar export` makes and proves the bundle, which takes minutes.
QUICK = pytest.param(("d2_10step_var", False), id="d2_10step_var")
PROVED = [
    pytest.param((name, True), marks=pytest.mark.slow, id=f"{name}-proved")
    for name in ("d2_10step_var", "d3_7step_llamagen")
]


@dataclass(frozen=True)
class Generated:
    """A recording, the bundle made from its checkpoint, and the output of `flexvar generate` with that bundle."""

    data: dict[str, Any]
    checkpoints: dict[str, str]
    bundle: Path
    report: dict[str, Any]
    tokens: NDArray[np.int32]
    images: NDArray[np.float32]


def flexvar(*arguments: object) -> dict[str, Any]:
    done = subprocess.run([str(FLEXVAR), *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def write_unproven(transformer: Path, vae: Path, out: Path) -> None:
    """Write a bundle of the graphs that generation needs, as `flexvar export` does, but without the proof."""
    model, tokenizer = flexvar_ref.load(transformer, vae)
    facts = model_facts(model, tokenizer)
    every = graph_specs(facts, "fp32")
    specs = {name: every[name] for name in REQUIRED}
    with write_bundle(out) as directory:
        for name, spec in specs.items():
            export_graph(graph_module(name, model, tokenizer, torch.float32, decoder=PHASES), spec, directory)
        tables(model, tokenizer).save(directory / TABLES_FILE)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision="fp32",
            decoder=PHASES,
            model=facts,
            graphs=specs,
            defaults=PUBLISHED_DEFAULTS,
            provenance=Provenance(
                transformer_sha256=hashlib.sha256(transformer.read_bytes()).hexdigest(),
                tokenizer_sha256=hashlib.sha256(vae.read_bytes()).hexdigest(),
                tools={},
            ),
            parity=UNPROVEN,
            largest_activation={},
            files={},
        )
        seal(directory, manifest)


@pytest.fixture(scope="module", params=[QUICK, *PROVED])
def generated(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Generated]:
    name, proved = request.param
    with np.load(golden / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    root = tmp_path_factory.mktemp(name)
    transformer = TransformerConfig.published(int(data["depth"]))
    pair = write_checkpoints(root / "checkpoint", transformer, TokenizerConfig(), int(data["seed"]))
    sums = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in pair}
    if proved:
        flexvar("export", pair[0], "--vae", pair[1], "-o", root / "bundle")
    else:
        write_unproven(*pair, root / "bundle")
    unproved = () if proved else ("--allow-unproved",)
    for path in pair:  # 290 MB
        path.unlink()
    report = flexvar(
        *("generate", root / "bundle", "-o", root / "images", "--save-arrays", root / "arrays.npz", *unproved),
        *("--classes", ",".join(map(str, data["labels"])), "--schedule", "_".join(map(str, data["schedule"]))),
        *("--cfg", data["cfg"], "--guidance", RULES[str(data["cfg_mode"])], "--max-side", data["max_pn"]),
        *("--top-k", 1, "--top-p", 0),
    )
    with np.load(root / "arrays.npz") as arrays:
        assert set(arrays.files) == {"tokens", "images"}
        yield Generated(data, sums, root / "bundle", report, arrays["tokens"], arrays["images"])
    for path in (root / "bundle").iterdir():
        path.unlink()


def test_greedy_tokens(generated: Generated) -> None:
    recorded = generated.data["greedy_tokens"]
    assert generated.tokens.dtype == np.int32 and generated.tokens.shape == recorded.shape
    np.testing.assert_array_equal(generated.tokens, recorded)


def test_greedy_images(generated: Generated) -> None:
    recorded = generated.data["greedy_image"]
    assert generated.images.dtype == np.float32 and generated.images.shape == recorded.shape
    np.testing.assert_allclose(generated.images, recorded.astype(np.float32), rtol=0, atol=IMAGE)


def test_png_files_are_the_images(generated: Generated) -> None:
    files = [image["file"] for image in generated.report["images"]]
    assert len(files) == len(generated.data["labels"])
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), to_uint8(generated.images))


@pytest.mark.parametrize("generated", PROVED, indirect=True)
def test_the_facts_and_provenance_in_the_bundle(generated: Generated) -> None:
    facts = flexvar("inspect", generated.bundle)
    depth = int(generated.data["depth"])
    assert (facts["model"]["depth"], facts["model"]["width"], facts["model"]["heads"]) == (depth, 64 * depth, depth)
    assert (facts["model"]["vocabulary"], facts["model"]["code_dim"], facts["model"]["downsampling"]) == (8912, 32, 16)
    assert facts["provenance"]["transformer_sha256"] == generated.checkpoints["transformer"]
    assert facts["provenance"]["tokenizer_sha256"] == generated.checkpoints["vae"]
    assert facts["parity"]["passed"] and not facts["parity"]["emulated"]
    assert facts["bundle"] == generated.report["bundle"]


def test_a_map_that_is_not_square(generated: Generated) -> None:
    """The recorded decode of 12×20 tokens; PNG rounding is half a step of 1/127.5."""
    tokens = generated.data["rect_tokens"].reshape(1, 12, 20)
    with FlexVARPipeline.from_bundle(generated.bundle, allow_unproved=True) as pipeline:
        [decoded] = [part.copy() for part in pipeline.generator.decode(tokens.astype(np.int32))]
        pixels = pipeline.decode(tokens)
    np.testing.assert_allclose(decoded, generated.data["rect_image"].astype(np.float32), rtol=0, atol=IMAGE)
    np.testing.assert_array_equal(pixels, to_uint8(decoded))


def test_the_published_sizes_give_the_same_bits_in_any_batch(generated: Generated) -> None:
    """Libraries block products by their sizes, so the test of the tiny model is repeated with the published sizes."""
    schedule = ScaleSchedule.parse("1_2_3x5_8")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 8912, (5, h, w)).astype(np.int32) for h, w in schedule]
    labels = [1, 5, 999, 1000, 5]
    with FlexVARPipeline.from_bundle(generated.bundle, allow_unproved=True) as pipeline:

        def logits(part: slice, guidance: Guidance) -> list[NDArray[np.float32]]:
            with pipeline.generator.loop(Request.of(labels[part], schedule, guidance)) as loop:
                previous = [None, *(scale[part] for scale in tokens)]
                return [loop.logits(i, previous[i]).copy() for i in range(len(schedule))]

        for guidance in (Guidance(2.5), Guidance(0)):
            all_logits = logits(slice(0, 5), guidance)
            for part in (slice(0, 1), slice(4, 5), slice(1, 4)):
                for one, many in zip(logits(part, guidance), all_logits, strict=True):
                    assert one.tobytes() == many[part].tobytes()


def test_the_published_decoder_gives_the_same_bits_in_any_batch(generated: Generated) -> None:
    maps = np.random.default_rng(0).integers(0, 8912, (5, 3, 5)).astype(np.int32)
    with FlexVARPipeline.from_bundle(generated.bundle, allow_unproved=True) as pipeline:
        together, alone = (np.concatenate([x.copy() for x in pipeline.generator.decode(t)]) for t in (maps, maps[4:]))
    assert alone.tobytes() == together[4:].tobytes()
