"""Writing a bundle: whole or not at all, also with other writers and when killed."""

from __future__ import annotations

import errno
import fcntl
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
from onnx_bytes import plain_graph

from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_runtime.bundle import opening
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.bundle.opening import Bundle
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files import directories

Edit = Callable[[Callable[[dict[str, Any]], object]], None]


@pytest.fixture(autouse=True)
def never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open bundles that are not proved: these files were never compared with a reference."""
    monkeypatch.setattr(opening, "check_certificate", lambda *_, **__: None)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _write(final: Path, manifest: Manifest, content: bytes, *, force: bool = False) -> None:
    with write_bundle(final, force=force) as directory:
        _fill(directory, manifest, content)
        seal(directory, manifest)


def _fill(directory: Path, manifest: Manifest, content: bytes) -> None:
    """The files of a bundle whose graphs do nothing, before it is sealed."""
    for spec in manifest.graphs.values():
        (directory / spec.file).write_bytes(plain_graph(spec))
    (directory / "content.bin").write_bytes(content)


def test_seal_returns_the_bundle_and_may_be_called_again(tmp_path: Path, manifest: Manifest) -> None:
    with write_bundle(tmp_path / "b") as directory:
        _fill(directory, manifest, b"1")
        first = seal(directory, manifest)
        assert Bundle.open(directory).sha256 == first.sha256
        (directory / "content.bin").write_bytes(b"3")
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
            _fill(directory, manifest, b"1")
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
    assert Bundle.open(bundle_dir).file("content.bin").read_bytes() == b"new"
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


def _cannot_exchange(*_: object) -> bool:
    """As on a file system that cannot exchange two names."""
    return False


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_nothing_is_lost_when_the_rename_fails(
    bundle_dir: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old, rename = Bundle.open(bundle_dir), os.rename
    monkeypatch.setattr(directories, "exchange", _cannot_exchange)

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
            _fill(directory, manifest, b"mine")
            seal(directory, manifest)
            _write(tmp_path / "b", manifest, b"theirs")

    with pytest.raises(InvalidInput, match=r"/(b|tiny\.bundle) .*--force"):
        overtaken()
    assert Bundle.open(tmp_path / "b").file("content.bin").read_bytes() == b"theirs"
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
    assert Bundle.open(tmp_path / "b").file("content.bin").read_bytes() == b"2"
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
    assert bundle.file("content.bin").read_bytes() in {bytes([i]) * 5000 for i in range(24)}
    assert _names(tmp_path) == ["b"]


def test_where_bundles_cannot_be_written(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(InvalidInput, match=r"none/b .*mkdir -p "):
        _write(tmp_path / "none" / "b", manifest, b"")
    with pytest.raises(InvalidInput, match=r"^/ "):
        _write(Path("/"), manifest, b"")


WRITER = """
    import os, shutil, sys, time
    from flexvar_export.bundle_writer import write_bundle
    from flexvar_runtime.files import directories
    final, moment = sys.argv[1:]
    if moment == "renaming":  # stop between moving the old bundle aside and renaming the new one
        rename = os.rename
        def stuck(source, target):
            if ".partial-" in str(source):
                print("ready", flush=True)
                time.sleep(600)
            rename(source, target)
        os.rename = stuck
        directories.exchange = lambda *_: False
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
    _write(tmp_path / "other", manifest, b"")  # the next writer in this folder
    assert _names(tmp_path) == [".b.partial-notes", "other"]
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


@pytest.mark.parametrize("reader", ["owner", "through a link", "without permission to write"])
def test_a_replacement_that_was_killed_is_undone_by_opening(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    old = Bundle.open(bundle_dir)
    _kill(_start_writer(bundle_dir, "renaming"))
    (tmp_path / "latest").symlink_to(bundle_dir)
    if reader == "without permission to write":
        monkeypatch.setattr(os, "rename", _no_permission)
    opened = Bundle.open(tmp_path / "latest" if reader == "through a link" else bundle_dir)
    assert opened.sha256 == old.sha256
    assert opened.path.is_dir()
    if reader != "without permission to write":
        assert opened == old


def _no_permission(*_: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


KILLED_AT = """
    import os, shutil, signal, sys
    from flexvar_export.bundle_writer import write_bundle
    from flexvar_runtime.files import directories
    final, new, moment, exchanges = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "exchange"
    if not exchanges:
        directories.exchange = lambda *_: False
    changes = 0
    def count(event, arguments):
        global changes
        if event in ("os.rename", "os.remove", "os.rmdir"):
            changes += 1
            if changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    with write_bundle(final, force=True) as directory:
        shutil.copytree(new, directory, dirs_exist_ok=True)
        sys.addaudithook(count)
    print(changes)
"""


@pytest.mark.parametrize("way", ["exchange", "rename"])
def test_a_bundle_can_be_opened_after_a_kill_at_any_moment(tmp_path: Path, manifest: Manifest, way: str) -> None:
    if way == "exchange" and not _can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    _write(tmp_path / "new", manifest, b"new")
    for moment in (1, 2, 3, 0):
        _write(tmp_path / "b", manifest, b"old", force=True)
        command = [sys.executable, "-c", textwrap.dedent(KILLED_AT), tmp_path / "b", tmp_path / "new", str(moment), way]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == (-signal.SIGKILL if moment else 0), done.stderr
        content = Bundle.open(tmp_path / "b").file("content.bin").read_bytes()
        assert content == b"new" if moment == 0 else content in (b"old", b"new")
    assert _names(tmp_path) == ["b", "new"]  # the last run removed what the others left


def _can_exchange(folder: Path) -> bool:
    pair = folder / "first", folder / "second"
    for path in pair:
        path.mkdir()
    able = directories.exchange(*pair)
    for path in pair:
        path.rmdir()
    return able
