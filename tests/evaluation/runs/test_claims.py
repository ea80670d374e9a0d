"""Claims: one living process a shard; those of dead processes are taken over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexvar_evaluation.runs import claims
from flexvar_evaluation.runs.claims import claimed

HOLD = """
import sys, time
from pathlib import Path
from flexvar_evaluation.runs.claims import claimed
with claimed(Path(sys.argv[1])) as claim:
    print(claim is not None, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_owner(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that holds the claim `claim`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "claim")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def test_a_claim_is_held_once_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claimed(path) as first:
        assert first is not None and path.exists()
        with claimed(path) as second:
            assert second is None
        assert path.exists()
    assert not path.exists()


def test_a_living_process_keeps_its_claim_and_a_dead_one_loses_it(
    tmp_path: Path, other_owner: subprocess.Popen[str]
) -> None:
    path = tmp_path / "claim"
    with claimed(path) as ours:
        assert ours is None
    other_owner.kill()
    other_owner.wait()
    assert path.exists()
    with claimed(path) as ours:
        assert ours is not None
    assert not path.exists()


@pytest.mark.parametrize(("age", "taken"), [(1.0, False), (claims.SECONDS_KEPT + 60, True)])
def test_another_machine_keeps_its_claim_while_it_touches_it(tmp_path: Path, age: float, taken: bool) -> None:
    path = tmp_path / "claim"
    path.write_text("other1", encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)
    with claimed(path) as ours:
        assert (ours is not None) == taken
    assert path.exists() != taken


def test_touching_shows_that_the_owner_lives(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claimed(path) as claim:
        assert claim is not None
        os.utime(path, (1.0, 1.0))
        claim.touch()
        assert path.stat().st_mtime > time.time() - 60


def test_without_locks_a_claim_is_left_behind_by_age_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "lock", lambda path, wait: None)
    path = tmp_path / "claim"
    with claimed(path) as first, claimed(path) as second:
        assert first is not None and second is None
        os.utime(path, (1.0, 1.0))
        with claimed(path) as third:
            assert third is not None
