"""Everything that the README and the pages it links to say is run: their commands and their Python, in order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from graph_cache import GraphCache
from PIL import Image

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in ("generating", "editing", "precision", "gpu", "deadlines"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "git": "test_install.py",
    ".": "test_install.py",
    "make": "test_install.py",
    ".venv-demo/bin/flexvar": "test_demo.py and test_install.py",
    "pip": "test_install.py",
}
"""Programs of the README that another test runs."""


@pytest.fixture(scope="module")
def desk(graph_cache: GraphCache, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with checkpoints of the published names and layouts, 1000 classes, and tiny sizes. Their graphs are
    those of the tiny bundles but for `condition`: what is traced here again is only that."""
    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    folder = tmp_path_factory.mktemp("desk")
    transformer, vae = write_checkpoints(folder, tiny_transformer(classes=1000), TINY_TOKENIZER)
    transformer.rename(folder / "FlexVARd16-epo179.pth")
    vae.rename(folder / "FlexVAE.pth")
    rng = np.random.default_rng(0)
    for name, size in (("photo", (48, 64)), ("small", (16, 16))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 16:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))  # receipts of engines
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # costs
        for name, value in graph_cache.environment.items():
            patch.setenv(name, value)
        yield folder


def run_commands(text: str, desk: Path) -> list[str]:
    """Run the `flexvar` commands of a block. Returns their subcommands."""
    ran = []
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program in ELSEWHERE:
            continue
        assert program == "flexvar", line
        command = [str(Path(sys.executable).parent / program), *arguments]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        ran.append(arguments[0])
    return ran


@pytest.mark.timeout(900)  # some thirty commands, two exports and a build among them
def test_every_command_and_python_block_runs(desk: Path) -> None:
    """In one test, because a block uses what the blocks before it have left on the desk."""
    ran = []
    for page in (README, *PAGES):
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language == "bash":
                ran += run_commands(text, desk)
                continue
            done = subprocess.run([sys.executable, "-c", text], cwd=desk, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{page.name}\n{text}\n{done.stderr}"
    assert set(ran) == {"export", "build", "generate", "doctor", "inspect", "verify", "edit"}
    original, again = (desk / folder / "000001_class0980.png" for folder in ("images", "again"))
    assert original.read_bytes() == again.read_bytes()
    assert (desk / "inpainted.png").read_bytes() == (desk / "same.png").read_bytes()
    assert (desk / "inpainted.png").read_bytes() != (desk / "another.png").read_bytes()
    assert (desk / "first.png").is_file()


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_commands_that_need_a_gpu(desk: Path) -> None:
    """Without one: the right exit code and the reason, and no image from elsewhere."""
    assert (desk / "d16.bundle").is_dir(), "the test above has exported it"
    gpu = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```console\n(.*?)^```", gpu, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        again = ["--force"] if arguments[0] == "generate" else []
        command = [str(Path(sys.executable).parent / program), *arguments, *again]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            assert done.returncode == 4 and "NVIDIA driver" in done.stderr, done.stderr


def test_it_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1200


def test_its_speeds_are_those_of_the_pages() -> None:
    """Where they have their conditions; test_gpu_results.py compares the page on GPUs with the results."""
    table = README.read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    precision, gpu = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("precision", "gpu"))
    shown = [(machine, cell) for machine, _, cell in rows[2:]]
    assert len(shown) == 7
    page = precision
    for machine, cell in shown:
        page = gpu if "NVIDIA" in machine else page
        if cell == "not measured":
            assert cell in page
            continue
        number, unit = cell.rsplit(" ", 1)
        assert (f"{number} s" if " to " in number else number) in page and unit in {"s", "ms"}, cell


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_targets_and_links_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
