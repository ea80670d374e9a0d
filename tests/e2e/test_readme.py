"""Everything the README says is run: its commands in order, then its Python."""

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

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(language: str = "bash") -> list[list[str]]:
    return [shlex.split(line) for block in blocks(language) for line in block.splitlines()]


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
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / "photo.jpg")
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 16:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))  # receipts of engines
        for name, value in graph_cache.environment.items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def ran(desk: Path) -> list[str]:
    """The subcommands of the README, all run in its order: what the other tests find on the desk."""
    ran = []
    for program, *arguments in commands():
        if program == "pip":
            continue  # test_install.py runs these
        assert program == "flexvar"
        command = [str(Path(sys.executable).parent / program), *arguments]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        ran.append(arguments[0])
    return ran


def test_every_command_runs(desk: Path, ran: list[str]) -> None:
    assert set(ran) == {"export", "build", "generate", "doctor", "inspect", "verify", "edit"}
    original, again = (desk / folder / "000001_class0980.png" for folder in ("images", "again"))
    assert original.read_bytes() == again.read_bytes()
    assert (desk / "filled.png").read_bytes() == (desk / "filled_again.png").read_bytes()


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_what_needs_a_gpu_says_so(desk: Path, ran: list[str]) -> None:
    """Without one: the right exit code and the fix, and no image from elsewhere."""
    for program, *arguments in commands("console"):
        again = ["--force"] if arguments[0] == "generate" else []
        command = [str(Path(sys.executable).parent / program), *arguments, *again]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            assert done.returncode == 4 and "no working NVIDIA driver" in done.stderr, done.stderr


def test_every_python_block_runs(desk: Path, ran: list[str]) -> None:
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=desk, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    assert (desk / "first.png").is_file()


def test_make_targets_and_links_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README.read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\((?!https|#)([^)]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
