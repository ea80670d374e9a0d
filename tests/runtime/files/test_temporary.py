"""Temporary files of killed processes are removed by the next one. Those of living processes stay."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from flexvar_runtime.files import temporary as module
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.temporary import SECONDS_KEPT, remove_leftovers, sibling, temporary

NAMES = ("a.png", "tables.npz", "d24.bundle", "step-0123456789ab.engine", "no suffix")


def _leftover(folder: Path, name: str, *, directory: bool = False) -> Path:
    """What a process leaves that is killed."""
    path = sibling(folder / name, "partial", Path(name).suffix)
    if directory:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "half").write_bytes(b"half")
    else:
        path.write_bytes(b"half")
    return path


def _age(path: Path) -> None:
    os.utime(path, (0, time.time() - SECONDS_KEPT - 60))


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_leftovers_are_removed(tmp_path: Path, name: str, directory: bool) -> None:
    _leftover(tmp_path, name, directory=directory)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_living_process_writes_stays(tmp_path: Path, name: str, directory: bool) -> None:
    with temporary(tmp_path / name, directory=directory) as path:
        _age(path)
        remove_leftovers(tmp_path)
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("directory", [False, True])
def test_what_another_system_may_still_write_stays_for_a_day(tmp_path: Path, directory: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "system_mark", lambda: "abcdef")
        path = _leftover(tmp_path, "a.png", directory=directory)
    remove_leftovers(tmp_path)
    assert path.exists()
    _age(path)
    remove_leftovers(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("directory", [False, True])
def test_without_locks_leftovers_stay_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: bool
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = _leftover(tmp_path, "a.png", directory=directory)
    remove_leftovers(tmp_path)
    assert path.exists()
    _age(path)
    remove_leftovers(tmp_path)
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no users here")
def test_files_of_other_users_and_of_other_programs_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    sibling(tmp_path / "a.png", "partial").symlink_to("target")
    for name in (".a.png.partial-notes", "a.png.partial-1-0123456789ab", ".partial-1-0123456789ab", ".a.png.partial"):
        (tmp_path / name).write_bytes(b"theirs")
    before = sorted(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    user = os.geteuid()
    path = _leftover(tmp_path, "a.png")
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    remove_leftovers(tmp_path)
    assert path.exists()


def test_a_name_that_was_taken_for_a_leftover_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may remove a temporary file after it is made and before it is locked."""
    real, made = module.lock, list[Path]()

    def overtaken(path: Path, *, wait: bool) -> int | None:
        made.append(path)
        if len(made) == 1:
            path.unlink()
        elif len(made) == 2:
            held = real(path, wait=wait)
            path.unlink()
            return held
        return real(path, wait=wait)

    monkeypatch.setattr(module, "lock", overtaken)
    with temporary(tmp_path / "a.png") as path:
        assert len(set(made)) == 3
        assert list(tmp_path.iterdir()) == [path]


WRITER = """
    import os, signal, sys
    from flexvar_runtime.files.atomic import atomic_write
    folder, how = sys.argv[1:]
    with atomic_write(os.path.join(folder, how + ".png")) as partial:
        partial.write_bytes(b"half")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
"""


def _write(folder: Path, how: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), folder, how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, env=environment, check=False, timeout=60).returncode


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    assert _write(tmp_path, "killed") == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".killed.png.partial-")
    with atomic_write(tmp_path / "mine.png") as mine:
        mine.write_bytes(b"new")
        assert list(tmp_path.iterdir()) == [mine]
        assert _write(tmp_path, "theirs") == 0  # another process leaves mine alone
        assert mine.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png", "theirs.png"]
