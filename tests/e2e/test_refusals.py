"""Refusals by the whole program: exit code, one line of error, JSON, and no files written.

The rules of bundles and options are tested where they are checked, and the wording in `test_error_messages.py`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexvar_runtime import Bundle
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.cli.main import main

FLEXVAR = Path(sys.executable).with_name("flexvar")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """Run `flexvar generate BUNDLE … --json`. It must end with this code and name the fault, and write no image."""

    def run(code: int, fault: str, bundle: Path, *options: object) -> None:
        capsys.readouterr()
        arguments = ["generate", bundle, "-o", tmp_path / "out", "--classes", "1", "--schedule", "1_2", *options]
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in [*arguments, "--json"]])
        captured = capsys.readouterr()
        error = json.loads(captured.out)["error"]  # nothing else on standard output
        assert end.value.code == code and fault in error["got"] and error["expected"], captured.err
        assert f"error: {error['got']} {error['fix']}\n" in captured.err
        assert not list(tmp_path.glob("out/*"))

    return run


def test_a_changed_file(refused: Callable[..., None], bundle_copy: Path) -> None:
    data = bytearray((bundle_copy / "step.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle_copy / "step.onnx.data").write_bytes(data)
    refused(5, "step.onnx.data", bundle_copy)


@pytest.mark.parametrize(
    ("name", "content"), [("tables.npz", b"PK\x03\x04"), ("condition.onnx", b""), ("decode.onnx", bytes(1000))]
)
def test_a_file_that_the_parser_refuses(
    refused: Callable[..., None],
    bundle_copy: Path,
    seal_proved: Callable[[Path, Manifest], Bundle],
    name: str,
    content: bytes,
) -> None:
    """Its checksum is right, but its content is not. Graphs are opened when they are needed."""
    manifest = Manifest.from_bytes((bundle_copy / "manifest.json").read_bytes())
    (bundle_copy / name).write_bytes(content)
    seal_proved(bundle_copy, manifest)
    refused(5, name, bundle_copy)


def test_a_precision_that_the_backend_does_not_run(refused: Callable[..., None], bundle_copy: Path) -> None:
    document = json.loads((bundle_copy / "manifest.json").read_text())
    (bundle_copy / "manifest.json").write_text(json.dumps(document | {"precision": "bf16"}))
    refused(4, "bf16", bundle_copy, "--backend", "ort-cpu")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--classes", "1,,2"], "--classes"),
        (["--classes", "9999999999"], "9999999999"),
        (["--classes", "1,2", "--first-index", str(2**64 - 1)], "--first-index"),
        (["--seed", str(2**64)], "--seed"),
        (["--top-p", "nan"], "--top-p"),
    ],
)
def test_an_option(refused: Callable[..., None], tiny_bundle: Path, options: list[str], fault: str) -> None:
    refused(2, fault, tiny_bundle, *options)


@pytest.mark.parametrize(("options", "code"), [(["--schedule", "1_2"], 0), (["--colour"], 2), (["--threads", "0"], 2)])
def test_the_installed_command(tiny_bundle: Path, tmp_path: Path, options: list[str], code: int) -> None:
    """In its own process: one JSON document on standard output, text on standard error, the exit code."""
    command = [FLEXVAR, "generate", tiny_bundle, "-o", tmp_path / "out", "--classes", "1", "--json", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("error" in json.loads(done.stdout)) == (code != 0) and "Traceback" not in done.stderr
    if code == 0:
        assert "generate 2/2: scale 2/2, 2x2 tokens\n" in done.stderr
    else:
        assert options[0].removeprefix("--") in done.stderr


def test_interrupted(tiny_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C between two images: exit code 130, and every written image is complete."""
    command = [FLEXVAR, "generate", tiny_bundle, "-o", tmp_path / "out", "--classes", ",".join(["1"] * 200)]
    process = subprocess.Popen(
        [*map(str, command), "--batch-size", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "generate 25/" in line:  # in the third image
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and err.endswith("interrupted\n") and "Traceback" not in err
    written = sorted((tmp_path / "out").iterdir())
    assert 2 <= len(written) < 200
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in written)
    assert {np.asarray(Image.open(path)).shape for path in written} == {(64, 64, 3)}
