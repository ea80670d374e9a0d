"""What was checked is what is used: a bundle that is replaced or edited while it is open."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flexvar_runtime import FlexVARPipeline
from flexvar_runtime.bundle import checked_files
from flexvar_runtime.bundle.opening import Bundle
from flexvar_runtime.errors import ArtifactRefused, InvalidInput

CHANGED = "changed while it was open"
Change = Callable[[Path], None]


def _edited(path: Path) -> None:
    """Edit in place: another byte, the same size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def _edited_with_times_restored(path: Path) -> None:
    before = path.stat()
    _edited(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replaced_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def _truncated(path: Path) -> None:
    os.truncate(path, 10)


def _removed(path: Path) -> None:
    path.unlink()


def _replaced_by_a_link(path: Path) -> None:
    target = path.parents[1] / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


CHANGES = [
    _edited,
    _edited_with_times_restored,
    _replaced_by_a_copy,
    _truncated,
    _removed,
    _replaced_by_a_link,
]


@pytest.mark.parametrize("name", ["step.onnx", "tables.npz", "weights/step.bin"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_before_and_after_it_is_opened(bundle_dir: Path, name: str, change: Change) -> None:
    bundle = Bundle.open(bundle_dir)
    with bundle.unchanged():
        pass
    with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: {name}"), bundle.unchanged():
        change(bundle_dir / name)
    with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: {name}"), bundle.unchanged():
        raise AssertionError("the body ran")


def test_the_change_is_reported_and_not_what_a_library_makes_of_it(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)

    def read() -> None:
        with bundle.unchanged():
            _truncated(bundle_dir / "step.onnx")
            raise RuntimeError("protobuf parsing failed")

    with pytest.raises(ArtifactRefused, match=CHANGED):
        read()


@pytest.mark.parametrize("name", ["step.onnx", "tables.npz", "weights/step.bin"])
def test_a_file_that_changes_while_it_is_hashed(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = checked_files.hashlib.file_digest
    inode = (bundle_dir / name).stat().st_ino

    def digest(file: object, kind: str) -> object:
        found = real(file, kind)
        if os.fstat(file.fileno()).st_ino == inode:  # type: ignore[attr-defined]
            _edited(bundle_dir / name)
        return found

    monkeypatch.setattr(checked_files.hashlib, "file_digest", digest)
    with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: {name}"):
        Bundle.open(bundle_dir)


def test_moving_and_removing_is_no_edit_but_the_rest_is(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    bundle_dir.rename(bundle_dir.with_name("moved"))
    bundle.require_unedited()
    (bundle_dir.with_name("moved") / "step.onnx").unlink()
    bundle.require_unedited()
    _edited(bundle_dir.with_name("moved") / "tables.npz")  # also after the move
    with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: tables\.npz"):
        bundle.require_unedited()


def test_a_closed_bundle(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    bundle.close()
    bundle.close()
    bundle.require_unedited()
    with pytest.raises(InvalidInput, match="closed"), bundle.unchanged():
        pass


@contextmanager
def _pipeline(bundle: Path, backend: str = "ort-cpu") -> Iterator[FlexVARPipeline]:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="needs openvino")
    with FlexVARPipeline.from_bundle(bundle, backend=backend, threads=1) as pipeline:
        yield pipeline


def _replace(live: Path, source: Path) -> None:
    """Publish a copy of `source` as `flexvar export --force` does where names cannot be exchanged."""
    new, old = live.with_name("new"), live.with_name("old")
    shutil.copytree(source, new)
    live.rename(old)
    new.rename(live)
    shutil.rmtree(old)


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
@pytest.mark.parametrize("name", ["step.onnx.data", "decode.onnx", "condition.onnx"])
def test_weights_that_are_edited_before_they_are_loaded(bundle_copy: Path, name: str, backend: str) -> None:
    with _pipeline(bundle_copy, backend) as pipeline:
        _edited(bundle_copy / name)
        with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: {name}"):
            pipeline([1], seed=0)


@pytest.mark.parametrize("name", ["step.onnx.data", "decode.onnx.data", "condition.onnx"])
def test_weights_that_are_edited_after_they_were_mapped(bundle_copy: Path, name: str) -> None:
    with _pipeline(bundle_copy) as pipeline:
        pipeline([1], seed=0)
        _edited(bundle_copy / name)
        with pytest.raises(ArtifactRefused, match=rf"{CHANGED}: {name}"):
            pipeline([1], seed=1)
        with pytest.raises(ArtifactRefused, match=CHANGED):
            next(pipeline.iter_scales([1], seed=1))
        with pytest.raises(ArtifactRefused, match=CHANGED):
            pipeline.decode(np.zeros((1, 1, 1), np.int32))


def test_a_bundle_that_is_replaced(bundle_copy: Path, tiny_bundle: Path) -> None:
    """What is open goes on, as the old bundle. What would be opened again is refused."""
    with _pipeline(bundle_copy) as pipeline:
        before = pipeline([1], seed=0)
        _replace(bundle_copy, tiny_bundle)
        after = pipeline([1], seed=0)
        assert (after.images == before.images).all()
        assert after.settings[0].bundle == before.settings[0].bundle
        with pytest.raises(ArtifactRefused, match=f"{CHANGED}.*Open the bundle again"):
            pipeline([2], seed=0)
    with _pipeline(bundle_copy) as pipeline:
        pipeline([2], seed=0)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts descriptors in /proc")
def test_no_file_stays_open(bundle_copy: Path) -> None:
    kept = []
    for _ in range(2):  # the first loads libraries
        before = _descriptors()
        kept += [FlexVARPipeline.from_bundle(bundle_copy, backend="ort-cpu", threads=1)]
        kept[-1]([1], seed=0)
        assert _descriptors() > before
        kept[-1].close()
    assert _descriptors() == before
    Bundle.open(bundle_copy)  # dropped, not closed
    _edited(bundle_copy / "tables.npz")
    for _ in range(3):
        with pytest.raises(ArtifactRefused):
            Bundle.open(bundle_copy)
    assert _descriptors() == before
