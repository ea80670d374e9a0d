"""`flexvar inspect`: the content of a bundle whose files were checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.backends import libraries
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.memory.plan import plan, size_text


def test_json_is_the_manifest(flexvar: Any, tiny_bundle: Path) -> None:
    ended = flexvar("inspect", tiny_bundle, "--json")
    assert ended.code == 0 and ended.err == ""
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    found = ended.json
    on_cuda = found.pop("ort_cuda")
    cuda = found.pop("cuda")
    assert not cuda["runs"] and cuda["detail"] == "cuda runs bf16 and fp16 bundles, but the bundle is fp32"
    assert "ort-cuda" in cuda["fix"]
    assert found.pop("proved") is True and found.pop("unproved_because") is None
    assert found == {"bundle": hashlib.sha256(manifest).hexdigest(), **json.loads(manifest)}
    assert on_cuda == {"runs": True, "without_kernel": {}, "detail": "has a CUDA kernel for every node"}


def test_a_bundle_that_ort_cuda_refuses(flexvar: Any, schema1_bundle: Path) -> None:
    """Normalisations that ONNX Runtime runs on the processor, in a bundle of an earlier version."""
    found = flexvar("inspect", schema1_bundle, "--json").json["ort_cuda"]
    assert not found["runs"] and set(found["without_kernel"]) == {"decode", "encode"}
    assert set(found["without_kernel"]["decode"]) == {"InstanceNormalization"}
    text = " ".join(flexvar("inspect", schema1_bundle).out.replace("│", "").split())
    assert "InstanceNormalization nodes of decode" in text
    assert "schema version 1 (" in text


def test_a_precision_that_ort_cuda_does_not_run(flexvar: Any, tiny_bundles: Callable[[str], Path]) -> None:
    found = flexvar("inspect", tiny_bundles("int8"), "--json").json["ort_cuda"]
    assert found == {"runs": False, "without_kernel": {}, "detail": "does not run int8"}


def test_a_bundle_that_cuda_runs(flexvar: Any, tiny_bundles: Callable[[str], Path]) -> None:
    bundle = tiny_bundles("fp16")
    assert flexvar("inspect", bundle, "--json").json["cuda"] == {"runs": True, "detail": "runs fp16", "fix": None}
    assert "can run on a GPU" in " ".join(flexvar("inspect", bundle).out.split())


def test_text(flexvar: Any, tiny_bundle: Path) -> None:
    ended = flexvar("inspect", tiny_bundle)
    assert ended.code == 0 and ended.err == ""
    for fact in (
        "fp32",
        "depth 2, width 128, 2 heads",
        "10 (label 10 means no class)",
        "512 codes of dimension 8, 4 pixels a side",
        "1_2_3_4_5_6_8_10_13_16",
        "top-k 900, top-p 0.95, greedy scales upstream",
        "schedules for deadlines",
        "passed on ort-cpu",
    ):
        assert fact in ended.out
    squeezed = "".join(ended.out.split()).replace("│", "")
    assert Bundle.open(tiny_bundle).sha256 in squeezed  # folded, not cut
    for first in ("past_k_0", "gamma1_0", "shift2_0"):
        assert first in ended.out and first.replace("_0", "_1") not in ended.out


def test_names_are_not_markup(flexvar: Any, bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["provenance"]["tools"]["[red]tool[/red]"] = "1"
    path.write_text(json.dumps(document))
    assert "[red]tool[/red] 1" in " ".join(flexvar("inspect", bundle_copy).out.replace("│", "").split())


def test_a_bundle_that_is_refused(flexvar: Any, bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "extra").write_bytes(b"")
    ended = flexvar("inspect", bundle_copy, "--json")
    assert ended.refused(5, "extra") and "extra" in ended.json["error"]["got"]
    assert flexvar("inspect", tmp_path / "nothing").code == 5


# Memory --------------------------------------------------------------------------------------------------------------


def test_the_memory_of_a_generation(flexvar: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, scales = Bundle.open(tiny_bundle).manifest, ScaleSchedule.parse("1_2_8x10")
    ort = libraries("ort-cpu", manifest.precision)
    left = plan(manifest, scales, 6, True, ort, decoded_at_once=1).total - 1
    monkeypatch.setattr("flexvar_runtime.cli.inspect.available_bytes", lambda: left)
    arguments = ("inspect", tiny_bundle, "--schedule", "1_2_8x10", "--batch-size", 3)
    memory = flexvar(*arguments, "--json").json["memory"]
    expected = plan(manifest, scales, 3, True, ort)
    assert memory == {"backend": "ort-cpu", **expected.to_json(), "available": left, "largest_batch": 5}
    ended = flexvar(*arguments)
    assert ended.code == 0 and "3 at once, guided" in ended.out and "keys and values" in ended.out
    assert size_text(expected.total) in ended.out and "largest batch that fits" in ended.out


@pytest.mark.parametrize(("precision", "backend"), [("bf16", "openvino"), ("int8-bf16", "ort-openvino")])
def test_memory_of_what_ort_cpu_does_not_run(
    flexvar: Any, tiny_bundles: Callable[[str], Path], precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the backend that does, with and without its library."""
    bundle = tiny_bundles(precision)
    scales, manifest = ScaleSchedule.parse("1_2_4"), Bundle.open(bundle).manifest
    here = flexvar("inspect", bundle, "--schedule", "1_2_4", "--json").json["memory"]
    assert here["backend"] == backend
    absent = Availability(False, "not installed", "install it")
    monkeypatch.setattr("flexvar_runtime.backends.openvino.backend.probe", lambda name: absent)
    ended = flexvar("inspect", bundle, "--schedule", "1_2_4")
    planned = plan(manifest, scales, 1, True, libraries(backend, manifest.precision))
    assert f"memory on {backend}" in ended.out and size_text(planned.total) in ended.out


def test_memory_is_planned_when_asked_for(flexvar: Any, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "memory" not in flexvar("inspect", tiny_bundle, "--json").json
    monkeypatch.setattr("flexvar_runtime.cli.inspect.available_bytes", lambda: None)
    memory = flexvar("inspect", tiny_bundle, "--cfg", 0, "--json").json["memory"]
    assert not memory["guided"] and memory["images"] == 1 and memory["schedule"] == "1_2_3_4_5_6_8_10_13_16"
    assert memory["available"] is None and memory["largest_batch"] is None
    assert "free on this machine" not in flexvar("inspect", tiny_bundle, "--batch-size", 2).out
    assert flexvar("inspect", tiny_bundle, "--schedule", "2_4").code == 2
