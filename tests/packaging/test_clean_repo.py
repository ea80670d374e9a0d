"""No tracked file names a directory of its author's machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work)/")


def tracked_files() -> list[Path]:
    """Tracked files, and those about to be: untracked and not ignored."""
    if shutil.which("git") is None:
        pytest.skip("git is missing: it knows which files are tracked")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def machine_paths(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if MACHINE_PATH.search(line)]


def test_no_machine_path() -> None:
    found = []
    for path in tracked_files():
        if not path.is_file() or (ROOT / "tests") in path.parents:
            continue
        content = path.read_bytes()
        if b"\0" not in content:  # text
            found += [f"{path.relative_to(ROOT)}: {line}" for line in machine_paths(content.decode("utf-8", "replace"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["cd /home/ann/flexvar", "DATA = '/root/data'", '{"bundle": "/work/d24.bundle"}'])
def test_a_machine_path_is_found(line: str) -> None:
    assert machine_paths(f"before\n{line}\nafter") == [line]


@pytest.mark.parametrize(
    "line", ["https://example.org/home/page", "see ~/work/ and tests/work/out", "at home/ or /homely"]
)
def test_other_paths_pass(line: str) -> None:
    assert machine_paths(line) == []
