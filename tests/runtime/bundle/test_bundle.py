"""Reading: every refusal names the file. Writing: whole or not at all, also with other writers and when killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_runtime.bundle.manifest import FileRecord, Manifest
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


# Reading ---------------------------------------------------------------------------------------------------------


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
    os.truncate(path, 3999)
    assert _refusal(bundle_dir).startswith("step.onnx has 3999 bytes")
    path.write_bytes(b"step" * 1000 + b"+")
    assert _refusal(bundle_dir).startswith("step.onnx has 4001 bytes")


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
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 2,\n "schema_version": 2'))
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


# Writing ---------------------------------------------------------------------------------------------------------


def _write(final: Path, manifest: Manifest, content: bytes, *, force: bool = False) -> None:
    with write_bundle(final, force=force) as directory:
        for name in ("step.onnx", "decoder.onnx"):
            (directory / name).write_bytes(content)
        seal(directory, manifest)


def test_seal_returns_the_bundle_and_may_be_called_again(tmp_path: Path, manifest: Manifest) -> None:
    with write_bundle(tmp_path / "b") as directory:
        (directory / "step.onnx").write_bytes(b"1")
        (directory / "decoder.onnx").write_bytes(b"2")
        first = seal(directory, manifest)
        assert Bundle.open(directory).sha256 == first.sha256
        (directory / "step.onnx").write_bytes(b"3")
        second = seal(directory, first.manifest)
        assert second.sha256 != first.sha256
        assert not (tmp_path / "b").exists()
    assert Bundle.open(tmp_path / "b").manifest == second.manifest
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_exception_in_the_body_leaves_nothing(tmp_path: Path, manifest: Manifest) -> None:
    def interrupted() -> None:
        with write_bundle(tmp_path / "b") as directory:
            (directory / "step.onnx").write_bytes(b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert _names(tmp_path) == []


def test_what_was_not_sealed_is_not_published(tmp_path: Path, manifest: Manifest) -> None:
    def unsealed() -> None:
        with write_bundle(tmp_path / "b"):
            pass

    def late() -> None:
        with write_bundle(tmp_path / "b") as directory:
            (directory / "step.onnx").write_bytes(b"1")
            (directory / "decoder.onnx").write_bytes(b"1")
            seal(directory, manifest)
            (directory / "late.bin").write_bytes(b"1")

    with pytest.raises(ArtifactRefused, match=r"manifest\.json"):
        unsealed()
    with pytest.raises(ArtifactRefused, match=r"^late\.bin "):
        late()
    assert _names(tmp_path) == []


def test_seal_refuses_what_a_reader_would(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "step.onnx").write_bytes(b"1")
    with pytest.raises(ArtifactRefused, match=r"graphs\['decoder'\]\.file is 'decoder\.onnx'"):
        seal(tmp_path, manifest)
    (tmp_path / "decoder.onnx").symlink_to("step.onnx")
    with pytest.raises(ArtifactRefused, match=r"^decoder\.onnx is a link"):
        seal(tmp_path, manifest)
    (tmp_path / "decoder.onnx").unlink()
    (tmp_path / "with space.onnx").write_bytes(b"")
    with pytest.raises(ArtifactRefused, match=r"'with space\.onnx'"):
        seal(tmp_path, manifest)
    assert not (tmp_path / "manifest.json").exists()


def test_an_existing_bundle_is_replaced_only_by_force(bundle_dir: Path, manifest: Manifest) -> None:
    old = Bundle.open(bundle_dir)
    with pytest.raises(InvalidInput, match=r"tiny\.bundle .*--force"):
        _write(bundle_dir, manifest, b"new")
    assert Bundle.open(bundle_dir) == old
    _write(bundle_dir, manifest, b"new", force=True)
    assert Bundle.open(bundle_dir).file("step.onnx").read_bytes() == b"new"
    assert _names(bundle_dir.parent) == ["tiny.bundle"]


def test_force_replaces_a_bundle_of_another_schema(bundle_dir: Path, manifest: Manifest, edit_manifest: Edit) -> None:
    edit_manifest(lambda document: document.update(schema_version=0))
    _write(bundle_dir, manifest, b"new", force=True)
    Bundle.open(bundle_dir)


@pytest.mark.parametrize("kind", ["file", "link", "empty", "photos", "web page", "damaged"])
def test_force_replaces_nothing_but_bundles(tmp_path: Path, bundle_dir: Path, manifest: Manifest, kind: str) -> None:
    final = tmp_path / "precious"
    if kind == "file":
        final.write_bytes(b"precious")
    elif kind == "link":
        final.symlink_to(bundle_dir)
    else:
        final.mkdir()
        manifests = {"web page": '{"name": "My site", "icons": []}', "damaged": "{", "photos": None, "empty": None}
        if text := manifests[kind]:
            (final / "manifest.json").write_text(text)
        if kind == "photos":
            (final / "me.jpg").write_bytes(b"")
    with pytest.raises(ArtifactRefused, match="precious"):
        _write(final, manifest, b"new", force=True)
    assert os.path.lexists(final)
    assert _names(tmp_path) == ["precious", "tiny.bundle"]
    Bundle.open(bundle_dir)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_nothing_is_lost_when_the_rename_fails(
    bundle_dir: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old, rename = Bundle.open(bundle_dir), os.rename

    def failing(source: Path, target: Path) -> None:
        if ".partial-" in str(source):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(type(error)):
        _write(bundle_dir, manifest, b"new", force=True)
    assert Bundle.open(bundle_dir) == old
    assert _names(bundle_dir.parent) == ["tiny.bundle"]


def test_a_bundle_that_appears_meanwhile_is_not_replaced(tmp_path: Path, manifest: Manifest) -> None:
    def overtaken() -> None:
        with write_bundle(tmp_path / "b") as directory:
            (directory / "step.onnx").write_bytes(b"mine")
            (directory / "decoder.onnx").write_bytes(b"mine")
            seal(directory, manifest)
            _write(tmp_path / "b", manifest, b"theirs")

    with pytest.raises(InvalidInput, match=r"/(b|tiny\.bundle) .*--force"):
        overtaken()
    assert Bundle.open(tmp_path / "b").file("step.onnx").read_bytes() == b"theirs"
    assert _names(tmp_path) == ["b"]


def test_file_systems_without_locks_are_served(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    unknown = tmp_path / ".b.partial-1-0123456789ab"  # dead or alive, nobody can tell: left alone
    unknown.mkdir()
    _write(tmp_path / "b", manifest, b"1")
    _write(tmp_path / "b", manifest, b"2", force=True)
    assert Bundle.open(tmp_path / "b").file("step.onnx").read_bytes() == b"2"
    assert _names(tmp_path) == [unknown.name, "b"]


def test_a_parent_reached_through_a_link(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    _write(tmp_path / "data" / "b", manifest, b"")
    assert _names(tmp_path / "disk") == ["b"]


@pytest.mark.parametrize("force", [False, True])
def test_writers_at_once_leave_one_whole_bundle(tmp_path: Path, manifest: Manifest, force: bool) -> None:
    def write(i: int) -> bool:
        try:
            _write(tmp_path / "b", manifest, bytes([i]) * 5000, force=force)
        except InvalidInput:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(24)))
    assert won.count(True) == (24 if force else 1)
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.file("step.onnx").read_bytes() == bundle.file("decoder.onnx").read_bytes()
    assert _names(tmp_path) == ["b"]


def test_where_bundles_cannot_be_written(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(InvalidInput, match=r"none/b .*mkdir -p "):
        _write(tmp_path / "none" / "b", manifest, b"")
    with pytest.raises(InvalidInput, match=r"^/ "):
        _write(Path("/"), manifest, b"")


WRITER = """
    import os, shutil, sys, time
    from flexvar_export.bundle_writer import write_bundle
    final, moment = sys.argv[1:]
    if moment == "renaming":  # stop between moving the old bundle aside and renaming the new one
        rename = os.rename
        def stuck(source, target):
            if ".partial-" in str(source):
                print("ready", flush=True)
                time.sleep(600)
            rename(source, target)
        os.rename = stuck
    with write_bundle(final, force=True) as directory:
        if moment == "renaming":
            shutil.copytree(final, directory, dirs_exist_ok=True)
        else:
            (directory / "step.onnx").write_bytes(b"half a graph")
            print("ready", flush=True)
            time.sleep(600)
"""


def _start_writer(final: Path, moment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(final), moment]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_kill_while_writing(tmp_path: Path, manifest: Manifest) -> None:
    process = _start_writer(tmp_path / "b", "writing")
    (leftover,) = _names(tmp_path)
    assert leftover.startswith(f".b.partial-{process.pid}-")
    _write(tmp_path / "b", manifest, b"meanwhile")  # a live writer is left alone
    assert _names(tmp_path) == [leftover, "b"]
    shutil.rmtree(tmp_path / "b")
    _kill(process)
    assert _names(tmp_path) == [leftover]  # nothing under the final name
    (tmp_path / ".b.partial-notes").mkdir()
    _write(tmp_path / "other", manifest, b"")  # nor is the leftover of another name touched
    assert _names(tmp_path) == [leftover, ".b.partial-notes", "other"]
    _write(tmp_path / "b", manifest, b"next")
    assert _names(tmp_path) == [".b.partial-notes", "b", "other"]
    Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("force", [False, True])
def test_kill_while_replacing_loses_nothing(bundle_dir: Path, manifest: Manifest, force: bool) -> None:
    old = Bundle.open(bundle_dir)
    _kill(_start_writer(bundle_dir, "renaming"))
    assert not bundle_dir.exists()
    if force:
        _write(bundle_dir, manifest, b"next", force=True)
        assert Bundle.open(bundle_dir).sha256 != old.sha256
    else:
        with pytest.raises(InvalidInput, match=r"/(b|tiny\.bundle) .*--force"):
            _write(bundle_dir, manifest, b"next")
        assert Bundle.open(bundle_dir) == old  # the next writer put it back before it looked
    assert _names(bundle_dir.parent) == ["tiny.bundle"]
