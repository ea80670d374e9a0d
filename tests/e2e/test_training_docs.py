"""The commands of docs/training.md run in order, with the small configurations and a single step."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="training needs the train extra")

ROOT = Path(__file__).parents[2]


def commands() -> list[list[str]]:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```console\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words[0] == "flexvar"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_documented_commands_train_and_export_a_bundle(tmp_path: Path) -> None:
    ran = []
    for _, *arguments in commands():
        arguments = [str(ROOT / word.replace("demo_", "smoke_")) if "configs/" in word else word for word in arguments]
        if arguments[0] == "train":
            arguments += ["--steps", "1", "--threads", "1"]
        command = [str(Path(sys.executable).parent / "flexvar"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        ran.append(arguments[:2])
    assert [words[0] for words in ran] == ["train", "train", "export"]
    assert (tmp_path / "my.bundle" / "manifest.json").is_file()
