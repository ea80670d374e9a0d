"""`flexvar inspect`: what a bundle says of itself, after its bytes were checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flexvar_runtime import Bundle


def test_json_is_the_manifest(flexvar: Any, tiny_bundle: Path) -> None:
    ended = flexvar("inspect", tiny_bundle, "--json")
    assert ended.code == 0 and ended.err == ""
    manifest = (tiny_bundle / "manifest.json").read_bytes()
    assert ended.json == {"bundle": hashlib.sha256(manifest).hexdigest(), **json.loads(manifest)}


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
        "passed on ort-cpu",
    ):
        assert fact in ended.out
    squeezed = "".join(ended.out.split()).replace("│", "")
    assert Bundle.open(tiny_bundle).sha256 in squeezed  # folded, not cut
    assert "past_k_0" in ended.out and "past_k_1" not in ended.out


def test_names_are_not_markup(flexvar: Any, bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    document = json.loads(path.read_text())
    document["provenance"]["tools"]["[red]tool[/red]"] = "1"
    path.write_text(json.dumps(document))
    assert "[red]tool[/red] 1" in " ".join(flexvar("inspect", bundle_copy).out.replace("│", "").split())


def test_a_bundle_that_is_refused(flexvar: Any, bundle_copy: Path, tmp_path: Path) -> None:
    (bundle_copy / "extra").write_bytes(b"")
    ended = flexvar("inspect", bundle_copy, "--json")
    assert ended.code == 5
    assert ended.json["error"]["got"] == "extra: a file that the manifest does not list"
    assert "  fix: remove it" in ended.err
    assert flexvar("inspect", tmp_path / "nothing").code == 5
