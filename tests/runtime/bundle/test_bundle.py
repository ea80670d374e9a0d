"""Opening a bundle: every refusal names the file."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexvar_runtime.bundle.manifest import FileRecord
from flexvar_runtime.bundle.opening import Bundle, hash_files, inventory
from flexvar_runtime.errors import ArtifactRefused, InvalidInput

Edit = Callable[[Callable[[dict[str, Any]], object]], None]


def _refusal(path: Path) -> str:
    """What `Bundle.open` says is wrong."""
    with pytest.raises(ArtifactRefused) as refusal:
        Bundle.open(path)
    assert refusal.value.exit_code == 5
    return refusal.value.got


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_open(bundle_dir: Path) -> None:
    bundle = Bundle.open(str(bundle_dir))
    assert bundle.sha256 == hashlib.sha256((bundle_dir / "manifest.json").read_bytes()).hexdigest()
    assert bundle.file("weights/step.bin") == bundle_dir.resolve() / "weights/step.bin"
    assert bundle.graph("step").file == "step.onnx"
    assert bundle.manifest.files["weights/empty.bin"] == FileRecord(size=0, sha256=hashlib.sha256(b"").hexdigest())
    assert _names(bundle_dir.parent) == ["tiny.bundle"]


def test_a_link_to_the_whole_bundle_is_the_users_own_business(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle_dir)
    assert Bundle.open(tmp_path / "latest").path == bundle_dir.resolve()


def test_engines_are_not_looked_at(bundle_dir: Path) -> None:
    (bundle_dir / "engines").mkdir()
    (bundle_dir / "engines" / "step.engine").symlink_to("/dev/null")
    Bundle.open(bundle_dir)


def test_unknown_names_are_refused(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    with pytest.raises(ArtifactRefused, match=r"^\.\./x .*decoder"):
        bundle.file("../x")
    with pytest.raises(ArtifactRefused, match=r"^edit .*decoder, step"):
        bundle.graph("edit")


def test_flipped_bit(bundle_dir: Path) -> None:
    for name in ("step.onnx", "weights/step.bin"):
        whole = (bundle_dir / name).read_bytes()
        for position in (0, -1):
            data = bytearray(whole)
            data[position] ^= 1
            (bundle_dir / name).write_bytes(data)
            text = _refusal(bundle_dir)
            assert text.startswith(f"{name} ") and "sha256" in text
        (bundle_dir / name).write_bytes(whole)
    Bundle.open(bundle_dir)


def test_cut_and_grown_file(bundle_dir: Path) -> None:
    path = bundle_dir / "step.onnx"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"+"):
        path.write_bytes(content)
        assert _refusal(bundle_dir).startswith(f"step.onnx has {len(content)} bytes")


def test_extra_file(bundle_dir: Path) -> None:
    for name in ("extra.onnx", "weights/extra.bin", ".DS_Store", "x\ny", "new/deep/er"):
        (bundle_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle_dir / name).write_bytes(b"")
        text = _refusal(bundle_dir)
        assert text.startswith(name if name.isprintable() else r"'x\ny'") and "manifest" in text
        (bundle_dir / name).unlink()


def test_empty_directory(bundle_dir: Path) -> None:
    (bundle_dir / "weights" / "cache").mkdir()
    assert _refusal(bundle_dir).startswith("weights/cache is an empty directory")


def test_missing_file(bundle_dir: Path) -> None:
    (bundle_dir / "tables.npz").unlink()
    assert _refusal(bundle_dir).startswith("tables.npz is missing")


def test_a_directory_in_place_of_a_file(bundle_dir: Path) -> None:
    (bundle_dir / "tables.npz").unlink()
    (bundle_dir / "tables.npz" / "engines").mkdir(parents=True)
    assert _refusal(bundle_dir).startswith("tables.npz/engines is an empty directory")


@pytest.mark.parametrize("name", ["step.onnx", "weights", "weights/step.bin", "manifest.json", "engines"])
def test_links(bundle_dir: Path, tmp_path: Path, name: str) -> None:
    (bundle_dir / "engines").mkdir()
    (bundle_dir / name).rename(tmp_path / "elsewhere")
    (bundle_dir / name).symlink_to(tmp_path / "elsewhere")
    assert _refusal(bundle_dir).startswith(f"{name} is a link")


def test_a_dangling_link(bundle_dir: Path) -> None:
    (bundle_dir / "dangling").symlink_to("nowhere")
    assert _refusal(bundle_dir).startswith("dangling is a link")


@pytest.mark.parametrize("name", ["step.onnx", "manifest.json", "extra"])
def test_fifo(bundle_dir: Path, name: str) -> None:
    (bundle_dir / name).unlink(missing_ok=True)
    os.mkfifo(bundle_dir / name)
    assert _refusal(bundle_dir).startswith(f"{name} is a special file")


def test_a_path_out_of_the_bundle(bundle_dir: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda document: document["files"].update({"../outside": document["files"]["step.onnx"]}))
    text = _refusal(bundle_dir)
    assert text.startswith("manifest.json: ") and "'../outside'" in text


def test_a_graph_in_an_unchecked_file(bundle_dir: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda document: document["graphs"]["step"].update(file="engines/step.onnx"))
    assert "graphs['step'].file is 'engines/step.onnx'" in _refusal(bundle_dir)


def test_a_manifest_that_does_not_fit_its_schema(bundle_dir: Path, edit_manifest: Edit) -> None:
    edit_manifest(lambda document: document["model"].update(layers=2))
    assert _refusal(bundle_dir).startswith("manifest.json: model has the unknown key 'layers'")
    edit_manifest(lambda document: document.update(schema_version=7))
    assert _refusal(bundle_dir).startswith("manifest.json has schema version 7")


def test_duplicate_key(bundle_dir: Path) -> None:
    path = bundle_dir / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version"', '"schema_version": 1,\n "schema_version"'))
    assert _refusal(bundle_dir).startswith("manifest.json has the key 'schema_version' twice")


def test_huge_manifest(bundle_dir: Path) -> None:
    os.truncate(bundle_dir / "manifest.json", 2**40)  # sparse: reading it whole would take a terabyte
    text = _refusal(bundle_dir)
    assert "manifest.json" in text and "16777217" in text


def test_no_bundle_at_all(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'} does not exist")
    (tmp_path / "file").write_bytes(b"")
    assert _refusal(tmp_path / "file").startswith(f"{tmp_path / 'file'} is a file")
    (tmp_path / "loop").symlink_to("loop")
    assert _refusal(tmp_path / "loop").startswith(f"{tmp_path / 'loop'} does not exist")
    assert _refusal(tmp_path).startswith(f"{tmp_path} has no manifest.json")


def test_unreadable_file(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def denied(path: Any, *args: Any, **kwargs: Any) -> int:  # by hand: to root nothing is unreadable
        if Path(path).name == "step.onnx":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", denied)
    assert _refusal(bundle_dir).startswith("step.onnx cannot be read (Permission denied)")


def _spy_on_open(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> int:
        opened.append(os.path.relpath(path, root.resolve()))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    return opened


def test_only_the_manifest_is_read_before_names_links_and_sizes_are_right(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = _spy_on_open(monkeypatch, bundle_dir)
    Bundle.open(bundle_dir)
    assert sorted(opened) == sorted(["manifest.json", *inventory(bundle_dir)])  # a negative control for the spy
    os.truncate(bundle_dir / "weights/step.bin", 5)
    opened.clear()
    _refusal(bundle_dir)
    assert opened == ["manifest.json"]


def test_no_parser_runs_before_the_refusal(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parser(*_: object, **__: object) -> None:
        raise AssertionError("a parser saw unchecked bytes")

    for name in ("numpy.load", "zipfile.ZipFile.__init__", "pickle.load", "pickle.loads"):
        monkeypatch.setattr(name, parser)
    Bundle.open(bundle_dir)
    (bundle_dir / "tables.npz").write_bytes(b"PK\x03\x04".ljust(600))
    assert _refusal(bundle_dir).startswith("tables.npz does not match its sha256 ")


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_parallel_hashing_equals_serial(tmp_path: Path, workers: int | None) -> None:
    contents = {f"{i}.bin": os.urandom(i * 100_003) for i in range(12)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    expected = {n: FileRecord(size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in contents.items()}
    records = hash_files(tmp_path, contents, workers)
    assert list(records.items()) == list(expected.items())


def test_hashing_wants_a_worker(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="threads is 0"):
        hash_files(tmp_path, [], 0)
