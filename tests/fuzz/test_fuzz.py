"""Random input of every kind ends as documented: `make fuzz` runs thousands of cases, `make test` a few of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FEW = {"one_process": 15, "installed": 3, "calls": 150, "pictures": 150, "bundles": 30}
COUNTED = """
from commands import all_commands, command_line
lines = [command_line(seed) for seed in range(3000)]
for words, parameters in all_commands():
    options = [each for each in parameters if each.param_type_name == "option"]
    names = {name for each in options for name in (*each.opts, *each.secondary_opts)}
    given = {word.partition("=")[0] for line in lines if line[: len(words)] == list(words) for word in line}
    assert names <= given, (words, names - given)
"""


@pytest.fixture(scope="module")
def desk(tiny_bundle: Path, tiny_checkpoint: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the cases name, in a folder of their own. The cases run beside it."""
    folder = tmp_path_factory.mktemp("fuzz") / "desk"
    arguments = [str(folder), str(tiny_bundle), *map(str, tiny_checkpoint)]
    subprocess.run([sys.executable, str(HERE / "desk.py"), *arguments], check=True)
    return folder


def run(kind: str, desk: Path, first: int, count: int) -> None:
    """Run the cases of a kind and print the summary."""
    command = [sys.executable, str(HERE / "campaign.py"), kind, str(desk), str(first), str(first + count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", FEW)
def test_a_few(kind: str, desk: Path) -> None:
    run(kind, desk, 0, FEW[kind])


@pytest.mark.fuzz
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", FEW)
def test_many(kind: str, desk: Path) -> None:
    """The numbers of cases and the first seed are those of the Makefile."""
    run(kind, desk, int(os.environ["FUZZ_FIRST"]), int(os.environ[f"FUZZ_{kind.upper()}"]))


def test_every_command_and_option_is_used() -> None:
    subprocess.run([sys.executable, "-c", COUNTED], cwd=HERE, check=True)


def test_wrong_ends_are_reported(tmp_path: Path) -> None:
    """A case that raises another exception, one that kills its process, and one that takes too much memory."""
    (tmp_path / "broken.py").write_text(
        "import os\n"
        "def prepare(desk): pass\n"
        "def show(desk, seed): return f'case {seed}'\n"
        "def run(desk, case, seed):\n"
        "    from outcome import refused\n"
        "    refused(lambda: 1 / (seed - 1))\n"
        "    if seed == 2: os.abort()\n"
        "    if seed == 3: bytearray(1500 << 20)[::4096] = b'x' * (1500 << 8)\n"
        "    return 'returned'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(HERE / "campaign.py"), "broken", str(tmp_path), "0", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and "seeds 0 to 4: 3 wrong; 2 returned" in done.stdout
    for text in ("seed 1: ZeroDivisionError", "case 1", "seed 2: the process ended with -6", "seed 3: 15"):
        assert text in done.stdout
