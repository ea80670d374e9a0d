from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from flexvar_runtime.bundle.manifest import FileRecord, Manifest, ParityRow, Range
from flexvar_runtime.errors import ArtifactRefused

RECORD = FileRecord(size=1, sha256="a" * 64)


@pytest.fixture
def sealed(manifest: Manifest) -> Manifest:
    return replace(manifest, files={name: RECORD for name in ("step.onnx", "decoder.onnx", "w/step.bin")})


def _refusal(document: dict[str, Any]) -> ArtifactRefused:
    with pytest.raises(ArtifactRefused) as refusal:
        Manifest.from_bytes(json.dumps(document).encode())
    return refusal.value


def test_bytes_round_trip_and_are_stable(sealed: Manifest) -> None:
    data = sealed.to_bytes()
    assert Manifest.from_bytes(data) == sealed
    shuffled = replace(sealed, files=dict(reversed(sealed.files.items())))
    assert shuffled.to_bytes() == data
    assert data.endswith(b"\n}\n")
    assert b'\n "files": {\n  "decoder.onnx"' in data


def test_the_schema_version_is_looked_at_before_anything_else() -> None:
    error = _refusal({"schema_version": 7, "hologram": True})
    assert str(error) == (
        "got manifest.json: schema version 7; expected 1 or 2; fix: upgrade flexvar-deploy or export again"
    )
    assert error.exit_code == 5


@pytest.mark.parametrize(
    ("version", "got"), [(None, "no schema version"), (True, "schema version True"), (1.0, "schema version 1.0")]
)
def test_only_the_integer_is_a_schema_version(version: object, got: str) -> None:
    assert _refusal({"schema_version": version}).got == f"manifest.json: {got}"


def test_a_list_has_no_schema_version() -> None:
    with pytest.raises(ArtifactRefused, match="no schema version"):
        Manifest.from_bytes(b"[1]")


@pytest.mark.parametrize(
    ("place", "value", "got"),
    [
        (("precision",), "fp8", "manifest.json: precision = 'fp8'"),
        (("model", "depth"), 0, "manifest.json: model.depth = 0"),
        (("model", "depth"), 257, "manifest.json: model.depth = 257"),
        (("model", "depth"), True, "manifest.json: model.depth = True"),
        (("model", "width"), 129, "manifest.json: model.width = 129"),
        (("model", "class_names"), ["cat"], "manifest.json: model.class_names of length = 1"),
        (("model", "null_class"), 4, "manifest.json: model.null_class = 4"),
        (("model", "vocabulary"), 2**20 + 1, "manifest.json: model.vocabulary = 1048577"),
        (("model", "downsampling"), 12, "manifest.json: model.downsampling = 12"),
        (("model", "downsampling"), 128, "manifest.json: model.downsampling = 128"),
        (("model", "value_range"), [1.0, -1.0], "manifest.json: model.value_range = (1.0, -1.0)"),
        (("model", "position_side"), 0, "manifest.json: model.position_side = 0"),
        (("model", "colour"), 0, "manifest.json: model: unknown key 'colour'"),
        (("graphs", "step", "inputs", 0, "dtype"), "float64", "manifest.json: graphs['step'].inputs[0].dtype = 'flo"),
        (("graphs", "step", "inputs", 0, "axes"), ["N L"], "manifest.json: graphs['step'].inputs[0].axes = ('N L',)"),
        (("graphs", "step", "inputs", 0, "axes"), [0], "manifest.json: graphs['step'].inputs[0].axes = (0,)"),
        (("graphs", "step", "inputs", 0, "name"), "logits", "manifest.json: graphs['step'].inputs and outputs = "),
        (("graphs", "step", "file"), "other.onnx", "manifest.json: graphs['step'].file = 'other.onnx'"),
        (("graphs", "../step"), {"file": "a", "inputs": [], "outputs": []}, "manifest.json: graphs: name = '../step'"),
        (("defaults", "schedule"), "1_two", "manifest.json: defaults.schedule = '1_two'"),
        (("defaults", "top_p"), 1.5, "manifest.json: defaults.top_p = 1.5"),
        (("defaults", "guidance_rule"), "linear", "manifest.json: defaults.guidance_rule = 'linear'"),
        (("defaults", "greedy_scales"), "7;9", "manifest.json: defaults.greedy_scales = '7;9'"),
        (("provenance", "tokenizer_sha256"), "A" * 64, "manifest.json: provenance.tokenizer_sha256 = 'AAAA"),
        (("parity", "rows", 0, "value"), "small", "manifest.json: parity.rows[0].value = 'small'"),
        (("parity", "free_running_agreement"), 1.1, "manifest.json: parity.free_running_agreement = 1.1"),
        (("largest_activation", "step", "value"), -1.0, "manifest.json: largest_activation['step'].value = -1.0"),
        (("largest_activation", "ghost"), {"value": 1, "where": ""}, "manifest.json: largest_activation: graph = 'gho"),
        (("float32_parts",), ["blocks.0.mlp"], "manifest.json: float32_parts = ('blocks.0.mlp',)"),  # in fp32
        (("float32_parts",), ["blocks.2.mlp"], "manifest.json: float32_parts = 'blocks.2.mlp'"),
        (("float32_parts",), ["blocks.0.head"], "manifest.json: float32_parts = 'blocks.0.head'"),
        (("decoder",), "phase", "manifest.json: decoder = 'phase'"),
        (("defaults", "quality_order"), ["1_3x5", "512px"], "manifest.json: defaults.quality_order = '512px'"),
        (
            ("defaults", "quality_order"),
            ["2_3x5"],
            "manifest.json: defaults.quality_order: a schedule with first scale",
        ),
        (("defaults", "quality_order"), ["1_2_4"], "manifest.json: defaults.quality_order = '1_2_4'"),
        (("defaults", "quality_order"), ["1_2_3x5", "1_2x2_3x5"], "manifest.json: defaults.quality_order = ('1_2_3x5'"),
        (("files", "step.onnx", "size"), -1, "manifest.json: files['step.onnx'].size = -1"),
        (("files", "step.onnx", "sha256"), "beef", "manifest.json: files['step.onnx'].sha256 = 'beef'"),
        (("files", "STEP.onnx"), {"size": 1, "sha256": "a" * 64}, "manifest.json: files = ["),
    ],
)
def test_refusals_name_the_place(sealed: Manifest, place: tuple[str | int, ...], value: object, got: str) -> None:
    document = json.loads(sealed.to_bytes())
    target = document
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    assert _refusal(document).got.startswith(got)


def test_parts_kept_in_float32(sealed: Manifest) -> None:
    """Bundles written before there were such parts have none."""
    document = json.loads(sealed.to_bytes())
    del document["float32_parts"]
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    kept = replace(sealed, precision="fp16", float32_parts=("blocks.0.mlp", "blocks.1.attention"))
    assert Manifest.from_bytes(kept.to_bytes()) == kept
    with pytest.raises(ArtifactRefused, match="every part once"):
        replace(kept, float32_parts=("blocks.0.mlp",) * 2)


def test_how_the_decoder_upsamples(sealed: Manifest) -> None:
    """Bundles written before there was a choice are plain."""
    document = json.loads(sealed.to_bytes())
    assert document.pop("decoder") == "plain"
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    phases = replace(sealed, decoder="phases")
    assert Manifest.from_bytes(phases.to_bytes()) == phases


def test_an_order_of_schedules_by_quality(sealed: Manifest) -> None:
    """Bundles written before there was one name none."""
    document = json.loads(sealed.to_bytes())
    del document["defaults"]["quality_order"]
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    order = ("1_2_2x3_3x5", "1_2_3x5", "1_3x5")
    named = replace(sealed, defaults=replace(sealed.defaults, quality_order=order))
    assert Manifest.from_bytes(named.to_bytes()) == named
    with pytest.raises(ArtifactRefused, match="schedule: a schedule with first scale 2"):  # the default itself
        replace(named.defaults, schedule="2_3x5")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../x",
        "..",
        "/etc/passwd",
        "a\\b",
        "C:x",
        "C:/x",
        "a//b",
        "a/",
        "",
        ".",
        "./a",
        ".hidden",
        "a\nb",
        "a\n",
        "a b",
        "é",
        "x" * 201,
        "manifest.json",
        "engines/x.engine",
        "engines",
    ],
)
def test_file_names_are_plain_and_relative(manifest: Manifest, sealed: Manifest, name: str) -> None:
    with pytest.raises(ArtifactRefused):  # the exporter cannot even make it
        replace(manifest, files={name: RECORD})
    document = json.loads(sealed.to_bytes())
    document["files"][name] = {"size": 1, "sha256": "a" * 64}
    assert "manifest.json: files: " in str(_refusal(document))


def test_metrics_are_finite() -> None:
    with pytest.raises(ArtifactRefused, match="got value = inf; expected a finite number: cap the metric"):
        ParityRow(graph="decoder", scale=None, output="image", metric="psnr", value=math.inf, bound=80.0)
    with pytest.raises(ArtifactRefused, match="got value = nan"):
        Range(value=math.nan, where="blocks.0")


def test_the_size_of_a_manifest_is_limited() -> None:
    with pytest.raises(ArtifactRefused, match=r"manifest\.json: bytes = 16777217; expected at most 16777216"):
        Manifest.from_bytes(b" " * (16 * 2**20 + 1))
