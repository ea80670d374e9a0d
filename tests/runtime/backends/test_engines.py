"""Engines: found only if they fit and this user built them, read only unchanged, written completely or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flexvar_export import engine_writer
from flexvar_export.engine_writer import built, lock_engine, write_engine
from flexvar_runtime.backends.tensorrt.engine_files import (
    PORTABLE,
    RECIPE,
    EngineId,
    Found,
    PrecisionReport,
    Profile,
    Receipt,
    build_line,
    find_engine,
    graph_sha256,
    read_engine,
    read_receipts,
    receipts_folder,
)
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.bundle.opening import Bundle
from flexvar_runtime.errors import ArtifactRefused, EnvironmentFailed
from flexvar_runtime.files.private import make_private, user_folder
from flexvar_runtime.files.temporary import sibling
from flexvar_runtime.model.tensors import TensorSpec

PLAN = b"engine" * 1000
REPORT = PrecisionReport(claimed="float16", layers={"matmul": {"float16": 7}}, fused_attention=2, share=1.0)
PROFILES = (
    Profile(name="4 after 1", axes={"new": (4, 4, 4), "past": (1, 1, 1), "sequences": (1, 2, 16)}),
    Profile(name="wide", axes={"new": (1, 4, 9), "past": (0, 1, 14), "sequences": (1, 2, 16)}),
)


@pytest.fixture
def bundle(bundle_dir: Path) -> Bundle:
    return Bundle.open(bundle_dir)


@pytest.fixture
def receipts(tmp_path: Path) -> Path:
    return tmp_path / "state" / "receipts"


@pytest.fixture
def wanted(bundle: Bundle) -> EngineId:
    return EngineId(
        graph="step",
        graph_sha256=graph_sha256(bundle, "step"),
        recipe=RECIPE,
        flavour="tensorrt-rtx",
        version="1.7.1",
        target=PORTABLE,
        profiles=PROFILES,
    )


@pytest.fixture
def write(bundle: Bundle, wanted: EngineId, receipts: Path) -> Callable[..., Found]:
    """Write an engine of `wanted` with some fields changed."""

    def make(plan: bytes = PLAN, folder: Path | None = None, **changes: Any) -> Found:
        one = dataclasses.replace(wanted, **changes)
        where = folder or bundle.path / "engines"
        with lock_engine(where, one, receipts):
            return write_engine(where, one, plan, REPORT, receipts)

    return make


@pytest.fixture
def find(bundle: Bundle, receipts: Path) -> Callable[..., Found]:
    def search(graph: str = "step", **changes: Any) -> Found:
        options = {"flavour": "tensorrt-rtx", "version": "1.7.1", "target": "8.6", "receipts": receipts} | changes
        return find_engine(bundle, graph, **options)

    return search


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(ArtifactRefused) as refusal:
        call()
    assert refusal.value.exit_code == 5
    return str(refusal.value)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# Profiles and keys


def test_profile() -> None:
    exact, wide = PROFILES
    assert exact.covers({"new": 4, "past": 1, "sequences": 16, "images": 99})
    assert not exact.covers({"new": 4, "past": 1, "sequences": 17})
    assert not exact.covers({"new": 5, "past": 1, "sequences": 1})
    assert wide.covers({"new": 5, "past": 0, "sequences": 1})
    tensor = TensorSpec(name="past_k_0", dtype="float16", axes=("past", "sequences", 2, 64))
    assert wide.shapes(tensor) == ((0, 1, 2, 64), (1, 2, 2, 64), (14, 16, 2, 64))
    image = Profile(name="image", axes={"images": (1, 1, 8), "height": (1, 6, 16)})
    spec = TensorSpec(name="image", dtype="float32", axes=("images", 3, "height_x16"))
    assert image.shapes(spec) == ((1, 3, 16), (1, 3, 96), (8, 3, 256))


def test_exact_profiles_come_first(wanted: EngineId) -> None:
    assert wanted.profile_for({"new": 4, "past": 1, "sequences": 2}) == 0
    assert wanted.profile_for({"new": 4, "past": 5, "sequences": 2}) == 1
    assert wanted.profile_for({"new": 10, "past": 5, "sequences": 2}) is None


def test_impossible_profiles() -> None:
    def profile(sizes: tuple[int, int, int]) -> Profile:
        return Profile(name="x", axes={"new": sizes})

    for sizes in ((2, 1, 3), (1, 4, 3), (-1, 1, 1), (0, 0, 2**31)):
        assert refused(partial(profile, sizes)).startswith("new is ")


def test_the_key_depends_on_everything_but_names(wanted: EngineId) -> None:
    renamed = tuple(dataclasses.replace(profile, name="other") for profile in PROFILES)
    assert dataclasses.replace(wanted, profiles=renamed).key == wanted.key
    changes: list[dict[str, Any]] = [
        {"graph_sha256": "0" * 64},
        {"recipe": "0"},
        {"flavour": "tensorrt"},
        {"version": "1.7.2"},
        {"target": "8.6"},
        {"profiles": PROFILES[::-1]},
        {"profiles": PROFILES[:1]},
    ]
    keys = {dataclasses.replace(wanted, **change).key for change in changes}
    assert len(keys | {wanted.key}) == len(changes) + 1


def test_the_hash_of_a_graph_covers_its_weights(
    bundle_dir: Path, manifest: Manifest, seal_proved: Callable[[Path, Manifest], Bundle]
) -> None:
    hashes = []
    for content in (None, b"weights", b"weighty"):
        if content is not None:
            (bundle_dir / "step.onnx.data").write_bytes(content)
            seal_proved(bundle_dir, manifest)
        hashes.append(graph_sha256(Bundle.open(bundle_dir), "step"))
    assert len(set(hashes)) == 3
    (bundle_dir / "tables.npz").write_bytes(b"other")
    seal_proved(bundle_dir, manifest)
    assert graph_sha256(Bundle.open(bundle_dir), "step") == hashes[-1]


# Finding and reading


def test_found(write: Callable[..., Found], find: Callable[..., Found], receipts: Path) -> None:
    found = write()
    sha256 = hashlib.sha256(PLAN).hexdigest()
    assert found.path.name == f"step-{found.receipt.key[:12]}-{sha256[:12]}.engine"
    assert files(found.path.parent) == [found.path.name]
    assert files(receipts) == [f"{found.path.stem}.json"]
    assert find() == found and read_engine(find()) == PLAN
    assert (found.receipt.engine_sha256, found.receipt.size, found.receipt.precision) == (sha256, 6000, REPORT)
    assert receipts.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in receipts.iterdir())


def test_the_newest(write: Callable[..., Found], find: Callable[..., Found]) -> None:
    write()
    newest = write(b"another", profiles=PROFILES[:1])
    assert find() == newest
    newest.path.unlink()
    assert find().receipt.profiles == PROFILES


def test_other_folders(
    write: Callable[..., Found], find: Callable[..., Found], tmp_path: Path, bundle_dir: Path
) -> None:
    found = write(folder=tmp_path / "elsewhere")
    assert find(engines_dir=tmp_path / "elsewhere") == found
    assert str(bundle_dir / "engines") in refused(find)
    assert f"--engines '{tmp_path}/a b'" in refused(lambda: find(engines_dir=tmp_path / "a b"))
    (bundle_dir / "engines").mkdir()
    shutil.copy(found.path, bundle_dir / "engines")  # a receipt is about content, not about a place
    assert read_engine(find()) == PLAN


@pytest.mark.parametrize(
    ("changes", "asked", "named"),
    [
        ({"version": "1.7.0"}, {}, "tensorrt-rtx 1.7.0, not 1.7.1"),
        ({"flavour": "tensorrt", "version": "11.4"}, {}, "tensorrt, not tensorrt-rtx"),
        ({"target": "8.9,12.0"}, {}, "GPU 8.9 and 12.0, not 8.6"),
        ({"target": "8.6"}, {"target": None}, "GPU 8.6,"),
        ({"recipe": "0"}, {}, f"recipe 0, not {RECIPE}"),
        ({"graph_sha256": "0" * 64}, {}, "another export"),
    ],
)
def test_unfit(
    write: Callable[..., Found],
    find: Callable[..., Found],
    bundle: Bundle,
    changes: dict[str, Any],
    asked: dict[str, Any],
    named: str,
) -> None:
    write(**changes)
    text = refused(lambda: find(**asked))
    assert text.startswith("The engine of step ") and named in text
    assert text.endswith(f"flexvar build {bundle.path} --backend tensorrt-rtx")


def test_the_nearest_reason_is_given(write: Callable[..., Found], find: Callable[..., Found]) -> None:
    write(target="8.9")
    write(b"newer", version="1.6.0", target="8.6")
    assert "GPU 8.9" in refused(find)


def test_targets_that_fit(write: Callable[..., Found], find: Callable[..., Found]) -> None:
    for target in (PORTABLE, "8.6", "8.0,8.6,8.9"):
        written = write(target=target)
        assert find() == written
        written.path.unlink()
    write(target="12.0")
    assert "GPU 12.0" in refused(lambda: find(target="2.0"))


def test_none(find: Callable[..., Found], bundle: Bundle, receipts: Path) -> None:
    assert f"step in {bundle.path}/engines." in refused(find)
    assert not receipts.exists() and not (bundle.path / "engines").exists()  # a search makes no folder


def test_an_engine_of_somebody_else(write: Callable[..., Found], find: Callable[..., Found], receipts: Path) -> None:
    """An engine that came with a bundle, or lost its receipt, is never used."""
    found = write()
    shutil.rmtree(receipts)
    assert f"{found.path.name} has no build receipt" in refused(find)


def test_a_receipt_under_another_name(write: Callable[..., Found], find: Callable[..., Found], receipts: Path) -> None:
    """A receipt that was renamed to fit another engine is not valid."""
    found = write()
    false = f"step-{'0' * 12}-{'1' * 12}"
    (receipts / f"{found.path.stem}.json").rename(receipts / f"{false}.json")
    found.path.rename(found.path.with_name(f"{false}.engine"))
    assert f"{false}.engine has no build receipt" in refused(find)


def test_broken_receipts_are_skipped(write: Callable[..., Found], find: Callable[..., Found], receipts: Path) -> None:
    found = write()
    (receipts / "notes.txt").write_text("x")
    (receipts / "step.json").write_text("x")
    for content in (b"", b"{}", b"{" * 9, b'{"schema_version": 2}', b"\xff" * 100, b'{"size": 1, "size": 1}'):
        (receipts / f"{found.path.stem}.json").write_bytes(content)
        assert "has no build receipt" in refused(find)


def test_receipts_are_for_this_user_alone(
    write: Callable[..., Found], find: Callable[..., Found], receipts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = write()
    receipts.chmod(0o770)
    text = refused(find)
    assert text.startswith(f"{receipts} ") and "770" in text
    assert text.endswith(f"chmod 700 {receipts}")
    receipts.chmod(0o755)
    assert find() == found
    (receipts / f"{found.path.stem}.json").chmod(0o666)
    assert "has no build receipt" in refused(find)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    for call in (find, lambda: make_private(receipts)):
        text = refused(call)
        assert text.startswith(f"{receipts} ") and f"user {user}" in text


def test_a_receipts_folder_behind_a_link(
    write: Callable[..., Found], find: Callable[..., Found], receipts: Path
) -> None:
    write()
    receipts.rename(receipts.with_name("real"))
    receipts.symlink_to("real")
    assert refused(find).startswith(f"{receipts} ")


def test_other_bytes(write: Callable[..., Found]) -> None:
    found = write()
    for content in (PLAN[:-1] + b"E", PLAN[:-1], PLAN * 2, b""):
        found.path.write_bytes(content)
        assert f"{found.path.name} was changed" in refused(lambda: read_engine(found))
    found.path.unlink()
    for make, named in ((None, "exist"), (Path.mkdir, "Is a directory"), (os.mkfifo, "regular file")):
        if make is not None:
            make(found.path)
        text = refused(lambda: read_engine(found))
        assert found.path.name in text and named in text and "flexvar build" in text
        if make is Path.mkdir:
            found.path.rmdir()


def test_a_link_in_place_of_an_engine(write: Callable[..., Found], find: Callable[..., Found], tmp_path: Path) -> None:
    """A link is refused even if its target has the same bytes: the owner of the target could change them."""
    found = write()
    found.path.rename(tmp_path / "real.engine")
    found.path.symlink_to(tmp_path / "real.engine")
    for call in (find, lambda: read_engine(found)):
        assert f"{found.path.name} is a link" in refused(call)


def test_the_users_folders(tmp_path: Path) -> None:
    home = {"HOME": "/base"}
    assert receipts_folder({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "flexvar/receipts"
    assert receipts_folder({"XDG_STATE_HOME": "relative", **home}) == Path("/base/.local/state/flexvar/receipts")
    assert user_folder("XDG_CACHE_HOME", ".cache", home) == Path("/base/.cache/flexvar")


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(EnvironmentFailed, match="XDG_STATE_HOME"):
        receipts_folder({})


def test_the_line_that_builds(tmp_path: Path) -> None:
    line = build_line(Path("my bundle"), "tensorrt", tmp_path)
    assert line == f"flexvar build 'my bundle' --backend tensorrt --engines {tmp_path}"


# Writing


def test_built(write: Callable[..., Found], wanted: EngineId, receipts: Path) -> None:
    found = write()
    folder = found.path.parent
    assert built(folder, wanted, receipts) == found
    assert built(folder, dataclasses.replace(wanted, target="8.6"), receipts) is None
    found.path.write_bytes(b"spoilt" * 1000)
    assert built(folder, wanted, receipts) is None


def test_a_new_engine_of_a_key_replaces_the_old(write: Callable[..., Found], find: Callable[..., Found]) -> None:
    other = write(b"kept", target="8.9")
    old = write()
    new = write(PLAN[::-1])
    assert old.path != new.path and find() == new
    assert files(new.path.parent) == sorted([new.path.name, other.path.name])


def test_leftovers_of_dead_builders_are_removed(
    write: Callable[..., Found], wanted: EngineId, receipts: Path, tmp_path: Path
) -> None:
    """Partial files of this user are removed, and engines without a receipt that have the same key."""
    found, other = write(), write(target="8.9")
    folder = found.path.parent
    orphan = folder / f"{wanted.prefix}{'0' * 12}.engine"
    half = sibling(folder / f"{other.receipt.prefix}{'0' * 12}.engine", "partial", ".engine")
    unrelated = folder / f"{other.receipt.prefix}{'0' * 12}.engine"
    for path in (orphan, half, unrelated):
        path.write_bytes(b"x")
    with lock_engine(folder, wanted, receipts):
        lock = f".{wanted.prefix}lock"
        assert files(folder) == sorted([found.path.name, other.path.name, unrelated.name, lock])
    assert files(folder) == sorted([found.path.name, other.path.name, unrelated.name])


def test_files_of_others_stay(
    write: Callable[..., Found], wanted: EngineId, receipts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may be shared. The engines of others have no receipt of this user."""
    folder = write().path.parent
    theirs = folder / f"{wanted.prefix}{'0' * 12}.engine"
    theirs.write_bytes(b"x")
    monkeypatch.setattr(engine_writer, "_own_files", lambda folder, prefix: [])
    with lock_engine(folder, wanted, receipts):
        assert theirs.exists()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".engine", ".json"])
def test_a_full_disk(
    write: Callable[..., Found], receipts: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    real = Path.write_bytes

    def write_bytes(path: Path, data: Any) -> int:
        if path.suffix == suffix:
            real(path, data[:7])
            raise FULL
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(EnvironmentFailed, match=r"No space left on device.*--engines") as refusal:
        write()
    assert refusal.value.exit_code == 4
    assert files(bundle.path / "engines") == [] and files(receipts) == []


def test_a_limit_on_file_size(write: Callable[..., Found], bundle: Bundle, receipts: Path) -> None:
    """The system refuses to write more bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(EnvironmentFailed, match="File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(bundle.path / "engines") == [] and files(receipts) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(write: Callable[..., Found], bundle: Bundle) -> None:
    bundle.path.chmod(0o500)
    try:
        with pytest.raises(EnvironmentFailed, match=r"Permission denied.*--engines"):
            write()
    finally:
        bundle.path.chmod(0o700)


def test_an_engines_folder_that_is_a_file(write: Callable[..., Found], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFailed, match="File exists"):
        write(folder=tmp_path / "file")


def test_two_builders_at_once(bundle: Bundle, wanted: EngineId, receipts: Path) -> None:
    """The others wait, say so once, and then find the engine built."""
    folder, builds, waits = bundle.path / "engines", [], []
    inside = threading.Event()

    def builder(number: int) -> Found:
        with lock_engine(folder, wanted, receipts, lambda: waits.append(number)):
            found = built(folder, wanted, receipts)
            if found is None:
                builds.append(number)
                inside.set()
                time.sleep(0.2)
                found = write_engine(folder, wanted, PLAN + bytes([number]), REPORT, receipts)
            return found

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(builder, 0)
        inside.wait(5)
        others = [pool.submit(builder, number) for number in (1, 2, 3)]
        results = [first.result(10), *(other.result(10) for other in others)]
    assert builds == [0] and sorted(waits) == [1, 2, 3]
    assert results == [results[0]] * 4 and files(folder) == [results[0].path.name]


@pytest.mark.parametrize("moment", ["half an engine", "an engine not yet named", "an engine without receipt"])
def test_killed(
    bundle: Bundle, wanted: EngineId, receipts: Path, find: Callable[..., Found], tmp_path: Path, moment: str
) -> None:
    """After kill -9 no engine can be loaded, and the next builder removes the leftovers."""
    code = f"""
        import os, signal, sys, pickle
        from pathlib import Path
        from flexvar_export import engine_writer
        wanted, report, folder, receipts = pickle.loads(bytes.fromhex(sys.argv[1]))
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
        moment = {moment!r}
        if moment == "half an engine":
            real = Path.write_bytes
            Path.write_bytes = lambda path, data: (real(path, data[:7]), die())
        elif moment == "an engine not yet named":
            os.replace = die
        else:
            real = os.replace
            os.replace = lambda a, b: die() if str(b).endswith(".json") else real(a, b)
        with engine_writer.lock_engine(folder, wanted, receipts):
            engine_writer.write_engine(folder, wanted, {PLAN!r}, report, receipts)
    """
    folder = bundle.path / "engines"
    given = pickle.dumps((wanted, REPORT, folder, receipts)).hex()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), given], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(files(folder)) == 2  # the engine in some state, and the lock
    refused(find)
    with lock_engine(folder, wanted, receipts):
        assert built(folder, wanted, receipts) is None
        found = write_engine(folder, wanted, PLAN, REPORT, receipts)
    assert files(folder) == [found.path.name] and read_engine(find()) == PLAN


def test_receipts_survive_json(write: Callable[..., Found], receipts: Path) -> None:
    receipt = write().receipt
    assert isinstance(receipt, Receipt)
    assert list(read_receipts(receipts, "step")) == [receipt]
    assert list(read_receipts(receipts, "decoder")) == []
