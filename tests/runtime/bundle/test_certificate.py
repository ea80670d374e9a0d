"""Which bundles the runtime opens: those whose parity record passed and names these very files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime import Bundle
from flexvar_runtime.bundle.certificate import Certificate, check_certificate, compared_files
from flexvar_runtime.bundle.manifest import FileRecord, Manifest
from flexvar_runtime.errors import ArtifactRefused

Document = dict[str, Any]
Edit = Callable[[Callable[[Document], object]], None]
OTHER = "e" * 64


def set_row(index: int, **values: object) -> Callable[[Document], object]:
    return lambda document: document["parity"]["rows"][index].update(values)


def set_file(name: str, sha256: str = OTHER) -> Callable[[Document], object]:
    return lambda document: document["parity"]["files"].update({name: sha256})


def as_old(version: int, **record: object) -> Callable[[Document], object]:
    """The manifest of an older schema version, whose record names no files."""

    def change(document: Document) -> None:
        document["schema_version"] = version
        del document["parity"]["files"]
        document["parity"].update(record)

    return change


UNPROVED: dict[str, tuple[Callable[[Document], object], str]] = {
    "it failed": (lambda document: document["parity"].update(passed=False), "does not agree"),
    "an error above its bound": (set_row(0, value=2e-5), "relative_error of logits (step, 3/3 (3x5)) is 2e-05"),
    "an error above a bound of 0": (set_row(0, bound=0), "its bound is 0"),
    "a PSNR below its bound": (set_row(1, value=79.9), "psnr_db of image"),
    "no rows": (lambda document: document["parity"].update(rows=[]), "never compared"),
    "a graph without a row": (lambda document: document["parity"]["rows"].pop(1), "The graph decoder"),
    "no files": (lambda document: document["parity"].update(files=None), "decoder.onnx was never compared"),
    "no key for the files": (lambda document: document["parity"].pop("files"), "decoder.onnx was never compared"),
    "a graph is left out": (lambda document: document["parity"]["files"].pop("step.onnx"), "step.onnx was never"),
    "tables are left out": (lambda document: document["parity"]["files"].pop("tables.npz"), "tables.npz was never"),
    "another graph": (set_file("decoder.onnx"), "decoder.onnx is not the file"),
    "other weights": (set_file("weights/step.bin"), "weights/step.bin is not the file"),
    "other tables": (set_file("tables.npz"), "tables.npz is not the file"),
    "a file that the bundle lacks": (set_file("ghost.onnx"), "names ghost.onnx"),
    "version 1 that failed": (as_old(1, passed=False), "does not agree"),
    "version 2 that failed": (as_old(2, passed=False), "does not agree"),
    "version 2 without rows": (as_old(2, rows=[]), "never compared"),
}


@pytest.fixture
def proved(manifest: Manifest) -> Manifest:
    """A manifest whose record names its files, without a bundle on disk."""
    names = ("decoder.onnx", "step.onnx", "tables.npz", "weights/step.bin")
    files = {name: FileRecord(size=1, sha256=f"{i:064x}") for i, name in enumerate(names)}
    sealed = replace(manifest, files=files)
    return replace(sealed, parity=replace(manifest.parity, files=compared_files(sealed)))


@pytest.mark.parametrize("kind", UNPROVED)
def test_what_is_not_proved(proved: Manifest, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """It is refused, or only warned of if the caller allows it."""
    change, problem = UNPROVED[kind]
    document = json.loads(proved.to_bytes())
    change(document)
    manifest = Manifest.from_bytes(json.dumps(document).encode())
    certificate = Certificate.of(manifest)
    assert certificate.refused and not certificate.proved
    with pytest.raises(ArtifactRefused) as refusal:
        check_certificate(manifest, allow_unproved=False)
    assert problem in refusal.value.got and "--allow-unproved" in refusal.value.fix and refusal.value.exit_code == 5
    assert not caplog.records
    check_certificate(manifest, allow_unproved=True)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and problem in caplog.text


def test_what_is_proved(proved: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    check_certificate(proved, allow_unproved=False)
    assert Certificate.of(proved).proved and not caplog.records


def test_opening(bundle_dir: Path, edit_manifest: Edit, caplog: pytest.LogCaptureFixture) -> None:
    Bundle.open(bundle_dir)
    for kind in ("other tables", "no key for the files", "it failed"):
        edit_manifest(UNPROVED[kind][0])
        caplog.clear()
        with pytest.raises(ArtifactRefused) as refusal:
            Bundle.open(bundle_dir)
        assert not caplog.records
        Bundle.open(bundle_dir, allow_unproved=True)
        assert UNPROVED[kind][1] in refusal.value.got
        assert refusal.value.got in caplog.text and len(caplog.records) == 1


def test_a_file_that_is_exchanged_together_with_its_hash(bundle_dir: Path, manifest: Manifest) -> None:
    """The manifest is consistent then, but the comparison was of another file."""
    from flexvar_export.bundle_writer import seal

    record = Bundle.open(bundle_dir).manifest.parity
    for name in ("step.onnx", "weights/step.bin", "tables.npz"):
        content = (bundle_dir / name).read_bytes()
        (bundle_dir / name).write_bytes(content[::-1] + b"+")
        seal(bundle_dir, replace(manifest, parity=record))
        with pytest.raises(ArtifactRefused, match=f"{name} is not the file"):
            Bundle.open(bundle_dir)
        (bundle_dir / name).write_bytes(content)
    seal(bundle_dir, replace(manifest, parity=record))
    Bundle.open(bundle_dir)


def test_a_file_that_is_added(bundle_dir: Path, manifest: Manifest) -> None:
    """A graph might load it. Only the card may be added without a new comparison."""
    from flexvar_export.bundle_writer import seal

    sealed = replace(manifest, parity=Bundle.open(bundle_dir).manifest.parity)
    (bundle_dir / "README.md").write_text("# A model\n")
    seal(bundle_dir, sealed)
    assert "README.md" in Bundle.open(bundle_dir).manifest.files
    (bundle_dir / "weights" / "README.md").write_text("weights")
    seal(bundle_dir, sealed)
    with pytest.raises(ArtifactRefused, match=r"weights/README\.md was never compared"):
        Bundle.open(bundle_dir)


def test_it_is_refused_before_files_are_read(
    bundle_dir: Path, edit_manifest: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(lambda document: document["parity"].update(passed=False))
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(ArtifactRefused, match="does not agree"):
        Bundle.open(bundle_dir)
    assert opened == ["manifest.json"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_bundle_of_an_older_schema_that_passed(
    bundle_dir: Path, edit_manifest: Edit, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    """It opens with one warning. The parity record of such a bundle must not name files."""
    files = json.loads((bundle_dir / "manifest.json").read_bytes())["parity"]["files"]
    edit_manifest(as_old(version))
    certificate = Certificate.of(Bundle.open(bundle_dir).manifest)
    assert not certificate.refused and not certificate.proved
    assert len(caplog.records) == 1
    assert f"schema version {version}" in caplog.text and "Export the bundle again" in caplog.text
    edit_manifest(lambda document: document["parity"].update(files=files))
    with pytest.raises(ArtifactRefused, match=r"manifest\.json: parity\.files"):
        Bundle.open(bundle_dir)


def test_a_committed_bundle_of_schema_version_1(schema1_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Bundle.open(schema1_bundle).manifest.parity.passed and len(caplog.records) == 1


def test_prefill_need_not_be_compared(manifest: Manifest) -> None:
    """It is not if the default schedule has fewer than three scales. Every other graph must be."""
    spec = manifest.graphs["step"]
    names = ("step.onnx", "decoder.onnx")
    files = {name: FileRecord(size=1, sha256=OTHER) for name in names}
    record = replace(manifest.parity, files=dict.fromkeys(names, OTHER))
    for name, proved in (("prefill", True), ("encode", False)):
        more = replace(manifest, graphs={**manifest.graphs, name: spec}, files=files, parity=record)
        assert Certificate.of(more).proved is proved


def test_the_card_is_not_compared(manifest: Manifest) -> None:
    record = FileRecord(size=1, sha256=OTHER)
    files = {name: record for name in ("README.md", "README.md.onnx", "docs/README.md", "step.onnx")}
    assert compared_files(replace(manifest, files=files)).keys() == files.keys() - {"README.md"}


UNLISTED = ("model.sig", ".gitattributes")


def test_files_that_may_lie_in_a_bundle_without_being_listed(
    bundle_dir: Path, manifest: Manifest, seal_proved: Callable[[Path, Manifest], Bundle]
) -> None:
    """Sealing does not list them, and the hash of the bundle stays the same."""
    before = Bundle.open(bundle_dir).sha256
    for name in UNLISTED:
        (bundle_dir / name).write_text("x")
    assert Bundle.open(bundle_dir).sha256 == before == seal_proved(bundle_dir, manifest).sha256


@pytest.mark.parametrize("name", UNLISTED)
def test_such_names_elsewhere(bundle_dir: Path, edit_manifest: Edit, name: str) -> None:
    """In a folder, in other case, and as something other than a file they are refused. They are never listed."""
    path = bundle_dir / name

    def refused() -> None:
        with pytest.raises(ArtifactRefused, match=f"(?i){name}"):
            Bundle.open(bundle_dir)

    for other in (bundle_dir / "weights" / name, path.with_name(name.upper())):
        other.write_text("x")
        refused()
        other.unlink()
    path.symlink_to("step.onnx")
    refused()
    path.unlink()
    os.mkfifo(path)
    refused()
    path.unlink()
    path.mkdir()
    (path / "x").write_text("x")
    refused()
    (path / "x").unlink()
    path.rmdir()
    path.write_text("x")
    Bundle.open(bundle_dir)
    edit_manifest(lambda document: document["files"].update({name: {"size": 1, "sha256": OTHER}}))
    refused()
