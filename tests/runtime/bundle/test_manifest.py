"""The manifest: it round-trips, every rule refuses with the place, and manifests of older versions are read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from flexvar_runtime.bundle.manifest import FileRecord, Manifest, ParityRow, Range
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.model.precision import Precision

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


def test_the_schema_version_is_checked_first() -> None:
    error = _refusal({"schema_version": 7, "hologram": True})
    assert "manifest.json" in error.got and "schema version 7" in error.got
    assert error.expected == "1, 2 or 3" and error.exit_code == 5


def test_only_an_integer_is_a_schema_version() -> None:
    for version in (None, True, 1.0):
        assert "schema version" in _refusal({"schema_version": version}).got
    with pytest.raises(ArtifactRefused, match="schema version"):
        Manifest.from_bytes(b"[1]")


@pytest.mark.parametrize(
    ("place", "value", "got"),
    [
        (("model", "depth"), 0, "model.depth is 0"),
        (("model", "depth"), 257, "model.depth is 257"),
        (("model", "width"), 129, "model.width is 129"),
        (("model", "class_names"), ["cat"], "model.class_names is ('cat',)"),
        (("model", "null_class"), 4, "model.null_class is 4"),
        (("model", "vocabulary"), 2**20 + 1, "model.vocabulary is 1048577"),
        (("model", "downsampling"), 12, "model.downsampling is 12"),
        (("model", "downsampling"), 128, "model.downsampling is 128"),
        (("model", "value_range"), [1.0, -1.0], "model.value_range is (1.0, -1.0)"),
        (("model", "position_side"), 0, "model.position_side is 0"),
        (("graphs", "step", "inputs", 0, "dtype"), "float64", "graphs['step'].inputs[0].dtype is 'float64'"),
        (("graphs", "step", "inputs", 0, "axes"), ["N L"], "graphs['step'].inputs[0].axes is ('N L',)"),
        (("graphs", "step", "inputs", 0, "axes"), [0], "graphs['step'].inputs[0].axes is (0,)"),
        (("graphs", "step", "inputs", 0, "name"), "logits", "graphs['step'].tensors is ['logits', 'logits']"),
        (("graphs", "step", "file"), "other.onnx", "graphs['step'].file is 'other.onnx'"),
        (("graphs", "../step"), {"file": "a", "inputs": [], "outputs": []}, "a name in graphs is '../step'"),
        (("defaults", "schedule"), "1_two", "defaults.schedule is '1_two'"),
        (("defaults", "schedule"), "1_0", "defaults.schedule: schedule has a scale of 0x0"),
        (("defaults", "schedule"), "2_4", "defaults.schedule: schedule begins with 2"),
        (("defaults", "schedule"), "1_129", "defaults.schedule: schedule has a scale of 129x129"),
        (("defaults", "schedule"), "1" + "_2" * 64, "defaults.schedule: schedule has more than 64 scales"),
        (("defaults", "top_p"), 1.5, "defaults.top_p is 1.5"),
        (("defaults", "greedy_scales"), "0", "defaults.sampling: greedy_scales is '0'"),
        (("defaults", "greedy_scales"), "7,07", "defaults.sampling: greedy_scales is '7,07'"),
        (("defaults", "guidance_rule"), "linear", "defaults.guidance_rule is 'linear'"),
        (("defaults", "greedy_scales"), "7;9", "defaults.greedy_scales is '7;9'"),
        (("provenance", "tokenizer_sha256"), "A" * 64, "provenance.tokenizer_sha256 is 'AAAA"),
        (("parity", "free_running_agreement"), 1.1, "parity.free_running_agreement is 1.1"),
        (("parity", "rows", 0, "bound"), -1e-5, "parity.rows[0].bound is -1e-05"),
        (("parity", "rows", 0, "value"), -1, "parity.rows[0].value is -1.0"),
        (("parity", "files"), {"../step.onnx": "a" * 64}, "parity.a name in files is '../step.onnx'"),
        (("parity", "files"), {"step.onnx": "a" * 63}, "parity.files['step.onnx'] is 'aaa"),
        (("parity", "files"), {"step.onnx": 1}, "parity.files['step.onnx'] is 1"),
        (("largest_activation", "step", "value"), -1.0, "largest_activation['step'].value is -1.0"),
        (("largest_activation", "ghost"), {"value": 1, "where": ""}, "a graph in largest_activation is 'ghost'"),
        (("float32_parts",), ["blocks.0.mlp"], "float32_parts is ('blocks.0.mlp',)"),  # in fp32
        (("float32_parts",), ["blocks.2.mlp"], "float32_parts is 'blocks.2.mlp'"),
        (("float32_parts",), ["blocks.0.head"], "float32_parts is 'blocks.0.head'"),
        (("decoder",), "phase", "decoder is 'phase'"),
        (("defaults", "quality_order"), ["1_3x5", "512px"], "defaults.quality_order is '512px'"),
        (("defaults", "quality_order"), ["2_3x5"], "defaults.quality_order: schedule "),
        (("defaults", "quality_order"), ["1_2_4"], "defaults.quality_order is '1_2_4'"),
        (("defaults", "quality_order"), ["1_2_3x5", "1_2x2_3x5"], "defaults.quality_order is ('1_2_3x5'"),
        (("parity", "rows", 0, "metric"), "PSNR_DB", "parity.rows[0].metric is 'PSNR_DB'"),
        (("graphs",), {f"g{i}": {"file": "step.onnx", "inputs": [], "outputs": []} for i in range(17)}, "graphs is 17"),
        (("files", "step.onnx", "size"), -1, "files['step.onnx'].size is -1"),
        (("files", "step.onnx", "sha256"), "beef", "files['step.onnx'].sha256 is 'beef'"),
        (("files", "STEP.onnx"), {"size": 1, "sha256": "a" * 64}, "files is ["),
    ],
)
def test_refusals_name_the_place(sealed: Manifest, place: tuple[str | int, ...], value: object, got: str) -> None:
    document = json.loads(sealed.to_bytes())
    target = document
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    assert _refusal(document).got.startswith(f"manifest.json: {got}")


def test_parts_kept_in_float32(sealed: Manifest) -> None:
    """Older bundles have no such key: no part is kept."""
    document = json.loads(sealed.to_bytes())
    del document["float32_parts"]
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    kept = replace(sealed, precision=Precision.FP16, float32_parts=("blocks.0.mlp", "blocks.1.attention"))
    assert Manifest.from_bytes(kept.to_bytes()) == kept
    with pytest.raises(ArtifactRefused, match="float32_parts"):
        replace(kept, float32_parts=("blocks.0.mlp",) * 2)


def test_how_the_decoder_upsamples(sealed: Manifest) -> None:
    """Older bundles have no such key: they are plain."""
    document = json.loads(sealed.to_bytes())
    assert document.pop("decoder") == "plain"
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    phases = replace(sealed, decoder="phases")
    assert Manifest.from_bytes(phases.to_bytes()) == phases


def test_an_order_of_schedules_by_quality(sealed: Manifest) -> None:
    """Older bundles have no such key: the order is empty."""
    document = json.loads(sealed.to_bytes())
    del document["defaults"]["quality_order"]
    assert Manifest.from_bytes(json.dumps(document).encode()) == sealed
    order = ("1_2_2x3_3x5", "1_2_3x5", "1_3x5")
    named = replace(sealed, defaults=replace(sealed.defaults, quality_order=order))
    assert Manifest.from_bytes(named.to_bytes()) == named
    with pytest.raises(ArtifactRefused, match="schedule"):  # the default itself
        replace(named.defaults, schedule="2_3x5")


BAD_NAMES = (
    *("../x", "a/../x", "..", "/etc/passwd", "a\\b", "C:x", "C:/x", "a//b", "a/", "", ".", "./a", ".hidden"),
    *("a\nb", "a\n", "a b", "é", "x" * 201, "manifest.json", "engines/x.engine", "engines"),
)


def test_file_names_are_plain_and_relative(manifest: Manifest, sealed: Manifest) -> None:
    for name in BAD_NAMES:
        with pytest.raises(ArtifactRefused, match="files"):  # an exporter cannot make it either
            replace(manifest, files={name: RECORD})
        document = json.loads(sealed.to_bytes())
        document["files"][name] = {"size": 1, "sha256": "a" * 64}
        assert "files" in _refusal(document).got


def test_metrics_are_finite() -> None:
    with pytest.raises(ArtifactRefused, match="value is inf"):
        ParityRow(graph="decoder", scale=None, output="image", metric="psnr_db", value=math.inf, bound=80.0)
    with pytest.raises(ArtifactRefused, match="value is nan"):
        Range(value=math.nan, where="blocks.0")


def test_the_size_of_a_manifest_is_limited() -> None:
    with pytest.raises(ArtifactRefused, match=r"manifest\.json .*16777217"):
        Manifest.from_bytes(b" " * (16 * 2**20 + 1))
