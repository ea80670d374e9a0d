"""What travels to a GPU machine: made, measured, refused where it is too much, and unpacked."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_bench import gpu_check
from flexvar_bench.gpu import pack, random_models, skeleton, trim_onnxruntime
from flexvar_bench.gpu.files import ModelFiles
from flexvar_bench.gpu.pack import MIB, Size, check_pack, make_pack, require_fit, skeleton_of, tracked_bytes, unpack
from flexvar_bench.gpu.plan import finished_before
from flexvar_bench.gpu.random_models import random_model, regenerate_model
from flexvar_bench.gpu.skeleton import make_skeleton, regenerate
from flexvar_bench.gpu.sources import source_hash
from flexvar_bench.gpu.stages import StageSetup, rehearsal, stage_plan
from flexvar_runtime import ArtifactRefused, Bundle
from flexvar_runtime.errors import EnvironmentFailed, InvalidInput


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A git checkout with one tracked file of 1,000 bytes."""
    root = tmp_path / "clone"
    root.mkdir()
    (root / "tracked").write_bytes(bytes(1000))
    (root / "untracked").write_bytes(bytes(5000))
    for command in (["init", "--quiet"], ["add", "tracked"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    return root


def track(root: Path, name: str, nbytes: int) -> None:
    with (root / name).open("wb") as file:
        file.truncate(nbytes)
    subprocess.run(["git", "-C", str(root), "add", "--intent-to-add", name], check=True)


@pytest.fixture
def work(tiny_bundle: Path, tmp_path: Path) -> Path:
    """The tiny model exported, as an earlier run leaves it: in float32, in the place of any other precision."""
    folder = tmp_path / "work"
    for name in ("", "tiny-fp16", "tiny-bf16"):
        (folder / name).mkdir(exist_ok=True)
        files = ModelFiles.of(folder / name, "tiny")
        shutil.copytree(tiny_bundle, files.bundle)
        files.proof.write_bytes(b"the proof")
        files.stamp.write_text(source_hash())
    return folder


@pytest.fixture
def packed(work: Path, clone: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "packed"
    make_pack(folder, rehearsal(folder), work, clone)
    return folder


# The skeleton ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_skeleton_gives_the_same_files_again(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "SMALL_BYTES", 1024)  # as large a share is made as of d16
    model = random_model("tiny")
    make_skeleton(tiny_bundle, model, tmp_path / "skeleton")
    found = regenerate(tmp_path / "skeleton", model, tmp_path / "again.bundle")
    assert contents(tmp_path / "again.bundle") == contents(tiny_bundle)
    assert found["made"] == len(list(tiny_bundle.glob("*.data"))) > 1
    weights = sum(path.stat().st_size for path in tiny_bundle.glob("*.data"))
    assert (tmp_path / "skeleton" / skeleton.CARRIED).stat().st_size < 0.1 * weights
    assert not list((tmp_path / "skeleton").rglob("*.data"))


def test_a_proof_and_a_bundle_that_are_there_are_left_alone(work: Path, tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    before = ModelFiles.of(work, "tiny").bundle.stat().st_mtime_ns
    regenerate_model("tiny", work, tmp_path / "nowhere", saved.append)
    assert ModelFiles.of(work, "tiny").bundle.stat().st_mtime_ns == before
    assert "made" not in saved[-1]


def test_what_other_sources_made_is_made_anew(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, files = list[dict[str, Any]](), ModelFiles.of(work, "tiny")
    make_skeleton(files.bundle, random_model("tiny"), tmp_path / "skeleton")
    files.stamp.write_text("other sources")
    files.in_phases.mkdir()
    regenerate_model("tiny", work, tmp_path / "skeleton", saved.append)
    assert saved[-1]["made"] > 0 and files.proof.read_bytes() != b"the proof" and not files.in_phases.exists()
    assert str(files.bundle) in capsys.readouterr().out
    plan = stage_plan("measure", rehearsal(tmp_path))
    assert list(finished_before(plan, work, source_hash())) == ["regenerate tiny"], "now it is used again"
    files.stamp.unlink()
    monkeypatch.setattr(random_models, "_write_bundle", lambda *given: given[2].mkdir())
    random_models.write_only_bundle("tiny", work, "fp32")
    assert not list(files.bundle.iterdir()), "exported anew, since nobody knows what made it"


def test_another_model_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """A weight that another processor made otherwise: by name, and nothing is left behind."""
    model, tokenizer = random_model("tiny")
    make_skeleton(tiny_bundle, (model, tokenizer), tmp_path / "skeleton")
    model.head.weight[0, 0] += 1e-3
    with pytest.raises(ArtifactRefused, match=r"step\.onnx\.data.*step\.onnx\.data: head\.weight"):
        regenerate(tmp_path / "skeleton", (model, tokenizer), tmp_path / "again.bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["skeleton"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (skeleton.CARRIED, "another sha256"),
        ("bundle/condition.onnx", "condition.onnx"),
        ("bundle/tables.npz", "tables"),
    ],
)
def test_a_broken_skeleton_is_refused(name: str, fault: str, tiny_bundle: Path, tmp_path: Path) -> None:
    model = random_model("tiny")
    make_skeleton(tiny_bundle, model, tmp_path / "skeleton")
    path = tmp_path / "skeleton" / name
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactRefused, match=fault):
        regenerate(tmp_path / "skeleton", model, tmp_path / "again.bundle")


# The pack -------------------------------------------------------------------------------------------------------------


def test_a_pack_for_a_rehearsal(packed: Path, clone: Path) -> None:
    listed = json.loads((packed / pack.CONTENTS).read_text())
    assert (listed["model"], listed["precision"]) == ("tiny", "fp16")
    files = {str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_file()}
    assert set(listed["files"]) == files - {pack.CONTENTS}
    assert skeleton_of(packed, "tiny").is_dir() and not {pack.ONNXRUNTIME, pack.LIBRARIES} & files
    assert tracked_bytes(clone) == 1000, "of tracked files only"
    check_pack(packed, rehearsal(packed))
    with pytest.raises(InvalidInput, match=r"--carried .*--tiny"):
        check_pack(packed, StageSetup(packed))
    (packed / pack.CONTENTS).write_text('{"model": "d16"}')
    with pytest.raises(InvalidInput, match=r"--carried .*d16.*--tiny"):
        check_pack(packed, rehearsal(packed))


def test_too_much_is_refused(work: Path, clone: Path, tmp_path: Path) -> None:
    track(clone, "large", 60 * MIB)
    folder = tmp_path / "packed"
    with pytest.raises(ArtifactRefused, match=r"60\.0 MiB of tracked files.* 62 MiB together"):
        make_pack(folder, rehearsal(folder), work, clone)
    assert not folder.exists()
    require_fit(Size(46 * MIB, 16 * MIB))
    with pytest.raises(ArtifactRefused, match="46 MiB packed"):
        require_fit(Size(46 * MIB + 1, 0))
    with pytest.raises(ArtifactRefused, match="62 MiB together"):
        require_fit(Size(30 * MIB, 32 * MIB + 1))


@pytest.mark.parametrize("missing", ["cuobjdump", "readelf", "xz"])
def test_a_missing_tool_is_named_before_anything_is_exported(
    missing: str, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for tool in {"cuobjdump", "readelf", "xz", "git"} - {missing}:
        (tmp_path / "bin" / tool).symlink_to(shutil.which("git") or "/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(trim_onnxruntime, "find_tool", shutil.which)
    monkeypatch.setattr(trim_onnxruntime.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(random_models, "export_model", lambda *_: pytest.fail("exported"))
    monkeypatch.setattr(random_models, "write_only_bundle", lambda *_: pytest.fail("exported"))
    (tmp_path / "work").mkdir()
    with pytest.raises(EnvironmentFailed, match=missing):
        make_pack(tmp_path / "packed", StageSetup(tmp_path / "packed"), tmp_path / "work", clone)


def test_outside_a_clone(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="git"):
        tracked_bytes(tmp_path)


def test_a_whole_pack_is_unpacked(work: Path, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the packages and the tiny bundles. d16 and the packages are stand-ins."""
    for name in ("onnxruntime", "nvmath"):
        package = tmp_path / "packages" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        with tarfile.open(tmp_path / f"{name}.tar.xz", "w:xz") as tar:
            tar.add(package, name)
    monkeypatch.setattr(pack, "_archive", lambda _: tmp_path / "onnxruntime.tar.xz")
    monkeypatch.setattr(pack, "libraries_name", lambda: "libraries-of-now.tar.xz")
    monkeypatch.setattr(pack, "pack_libraries", lambda archive: shutil.copy(tmp_path / "nvmath.tar.xz", archive))
    monkeypatch.setattr(random_models, "write_only_bundle", lambda *_: None)
    monkeypatch.setattr(skeleton, "make_skeleton", lambda _, __, folder: folder.mkdir(parents=True))
    folder, there, saved = tmp_path / "packed", tmp_path / "there", list[dict[str, Any]]()
    there.mkdir()
    make_pack(folder, StageSetup(folder), work, clone)
    assert (work / "libraries-of-now.tar.xz").is_file(), "kept for the next time"
    for _ in range(2):  # again over what is there
        unpack(folder, there, ["fp16", "bf16"], saved.append)
    assert saved[-1]["archives"] == ["onnxruntime.tar.xz", "libraries.tar.xz"]
    assert all((there / "site" / name / "__init__.py").is_file() for name in ("onnxruntime", "nvmath"))
    both = [ModelFiles.of(there / f"tiny-{precision}", "tiny") for precision in ("fp16", "bf16")]
    for files in both:
        assert Bundle.open(files.bundle).manifest.decoder and files.proof.read_bytes() == b"the proof"
    files.stamp.write_text("other sources")
    files.proof.write_bytes(b"of other sources")
    unpack(folder, there, ["fp16", "bf16"], saved.append)
    assert files.proof.read_bytes() == b"the proof" and files.made_by(source_hash())
    (folder / "tiny-bf16" / "tiny.proof.npz").write_bytes(b"another")
    with pytest.raises(ArtifactRefused, match=r"tiny-bf16/tiny\.proof\.npz"):
        unpack(folder, there, ["fp16"], saved.append)


def test_a_folder_that_exists_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--pack", str(tmp_path), "--tiny"]) == 2
    assert "--pack" in capsys.readouterr().err


def test_results_of_stages_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And the table for the documents is printed."""
    facts = {"schema": 1, "created": "2026-11-27T10:00:00+00:00", "options": {}, "version": "1", "model": "d16"}
    facts |= {"minutes_taken": 3, "source_sha256": "x", "gpu": "NVIDIA H200"}
    quick = {"status": "done", "reason": None, "stderr": None, "seconds": 1, "result": {}}
    for stage in ("first", "measure"):
        document = facts | {"phases": {f"step of {stage}": quick}, "rows": []}
        (tmp_path / f"gpu_check_{stage}.json").write_text(json.dumps(document))
    assert gpu_check.main(["--merge", str(tmp_path), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| `cuda` | fp16 | cuda-graph | not measured | not measured | not measured |") == 1
    merged = json.loads((tmp_path / "gpu_nvidia-h200_2026-11-27.json").read_text())
    assert set(merged["phases"]) == {"step of first", "step of measure"}
