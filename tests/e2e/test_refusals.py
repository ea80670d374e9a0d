"""What the command line refuses: exit code, what was got, what was expected and how to fix it; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexvar_export.bundle_writer import seal
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.cli.main import main

FLEXVAR = Path(sys.executable).with_name("flexvar")
Change = Callable[[Path], object]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run `flexvar generate BUNDLE … --json`, which must end with this exit code; gives the refusal's text."""

    def run(code: int, bundle: Path, *options: object, started: bool = False) -> str:
        capsys.readouterr()
        arguments = ["generate", bundle, "-o", tmp_path / "out", "--classes", "1", "--schedule", "1_2", *options]
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in [*arguments, "--json"]])
        captured = capsys.readouterr()
        error = json.loads(captured.out)["error"]  # nothing else on standard output
        assert end.value.code == code, captured.err
        assert (tmp_path / "out").exists() == started and not list(tmp_path.glob("out/*"))
        if error["type"] != "UsageError":
            for label, key in (("error: got", "got"), ("  expected", "expected"), ("  fix", "fix")):
                assert error[key] and f"{label}: {error[key]}\n" in captured.err
        return f"{error['got']} | {error['expected']} | {error['fix']}"

    return run


def edit(change: Callable[[Any], object]) -> Change:
    """Change the parsed manifest of a bundle."""

    def apply(bundle: Path) -> None:
        document = json.loads((bundle / "manifest.json").read_text())
        change(document)
        (bundle / "manifest.json").write_text(json.dumps(document))

    return apply


def flip(name: str) -> Change:
    def apply(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)

    return apply


def link(bundle: Path) -> None:
    (bundle / "tables.npz").rename(bundle.parent / "tables.npz")
    (bundle / "tables.npz").symlink_to(bundle.parent / "tables.npz")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (flip("step.onnx.data"), "step.onnx.data: sha256 "),
        (flip("tables.npz"), "tables.npz: sha256 "),
        (flip("proof.npz"), "copy the whole bundle again, or export it again"),
        (lambda bundle: os.truncate(bundle / "step.onnx.data", 1000), "step.onnx.data: 1000 bytes | "),
        (lambda bundle: os.truncate(bundle / "manifest.json", 1000), "manifest.json: "),
        (edit(lambda manifest: manifest.update(author="me")), "manifest.json: unknown key 'author' | only the keys "),
        (lambda bundle: (bundle / "notes.txt").write_text("x"), "notes.txt: a file that the manifest does not list | "),
        (lambda bundle: (bundle / "decode.onnx").unlink(), "decode.onnx: no such file | a file of "),
        (link, "tables.npz: a link | a regular file | copy the bundle with its links resolved"),
        (
            edit(lambda manifest: manifest["files"].update({"../secret": manifest["files"]["tables.npz"]})),
            "manifest.json: files: name = '../secret' | a plain relative name inside the bundle",
        ),
        (
            edit(lambda manifest: manifest["graphs"]["step"].update(file="/etc/passwd")),
            "file = '/etc/passwd' | a plain relative name",
        ),
        (
            edit(lambda manifest: manifest.update(schema_version=3)),
            "schema version 3 | 1 or 2 | upgrade flexvar-deploy or",
        ),
        (edit(lambda manifest: manifest["model"].update(depth=3)), "graph condition with other tensors than a fp32"),
        (
            edit(lambda manifest: manifest["graphs"]["step"]["outputs"].pop()),
            "graph step with other tensors than a fp32 model of its size has | ",
        ),
        (edit(lambda manifest: manifest["defaults"].update(schedule="4_5")), "a bundle whose default is a schedule"),
        (edit(lambda manifest: manifest["graphs"].pop("encode")), "largest_activation: graph = 'encode'"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "without manifest.json | a bundle | name the directory"),
        (shutil.rmtree, "nothing at "),
    ],
)
def test_bundles(refused: Callable[..., str], bundle_copy: Path, change: Change, text: str) -> None:
    change(bundle_copy)
    assert text in refused(5, bundle_copy)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tables.npz", b"PK\x03\x04", "tables.npz (File is not a zip file) | arrays in npz form | export again"),
        ("condition.onnx", b"", "condition.onnx: "),
        ("step.onnx", b"no graph", "step.onnx: "),
        ("decode.onnx", bytes(1000), "decode.onnx: "),
    ],
)
def test_a_file_that_is_intact_but_no_graph(
    refused: Callable[..., str], bundle_copy: Path, name: str, content: bytes, text: str
) -> None:
    """Hashes hold, the parser refuses: its refusal, not its traceback. A graph is opened when it is needed."""
    manifest = Manifest.from_bytes((bundle_copy / "manifest.json").read_bytes())
    (bundle_copy / name).write_bytes(content)
    seal(bundle_copy, manifest)
    assert text in refused(5, bundle_copy, started=name != "tables.npz")


def test_a_precision_without_kernels(refused: Callable[..., str], bundle_copy: Path) -> None:
    edit(lambda manifest: manifest.update(precision="bf16"))(bundle_copy)
    assert "a bundle of precision bf16 on ort-cpu | one of fp16, fp32, int8 | use openvino, which runs it" in refused(
        4, bundle_copy, "--backend", "ort-cpu"
    )


@pytest.mark.parametrize(
    ("code", "options", "text"),
    [
        (2, ["--classes", "11"], "class 11 | a whole number from 0 to 10 (10 means no class) | flexvar inspect says"),
        (
            2,
            ["--classes", "-1"],
            "class '-1' | numbers (this bundle has no class names) | flexvar inspect says which classes",
        ),
        (2, ["--classes", "1,,2"], "class '' | numbers"),
        (2, ["--classes", "1.5"], "class '1.5' | "),
        (2, ["--classes", "9999999999"], "class '9999999999' | "),
        (2, ["--schedule", "2_4"], "a schedule with first scale 2 | 1 as the first scale | write it like 1_2_4_8_16"),
        (2, ["--schedule", "1_2_500"], "a schedule with a scale of 500x500 | sides from 1 to 128 tokens"),
        (2, ["--schedule", "1_0x4"], "a schedule with a scale of 0x4"),
        (2, ["--schedule", ""], "schedule '' | sides joined by _"),
        (2, ["--schedule", "1024px"], "schedule '1024px' | sides joined by _"),
        (2, ["--top-k", "-1"], "top_k -1 | a whole number, 0 or more"),
        (2, ["--top-k", "1.5"], "Invalid value for '--top-k'"),
        (2, ["--top-p", "1.01"], "top_p 1.01 | a number from 0 to 1 | pass the probability mass to keep"),
        (2, ["--top-p", "-0.1"], "top_p -0.1 | "),
        (2, ["--top-p", "nan"], "top_p nan | "),
        (2, ["--cfg", "nan"], "guidance scale nan | a number from 0 to 1000 | 2.5 is the published one"),
        (2, ["--cfg", "inf"], "guidance scale inf | "),
        (2, ["--cfg", "-1"], "guidance scale -1.0 | "),
        (2, ["--cfg", "1e9"], "guidance scale 1000000000.0 | "),
        (2, ["--guidance", "linear"], "guidance rule 'linear' | ramp or constant | name one of them"),
        (2, ["--greedy-scales", "some"], 'greedy_scales \'some\' | "upstream", "none" or scales such as'),
        (2, ["--max-side", "0"], "max_side 0 | a whole number, 1 or more"),
        (2, ["--seed", "-1"], "seed -1 | a whole number from 0 to 18446744073709551615"),
        (2, ["--seed", str(2**64)], "seed 18446744073709551616 | "),
        (2, ["--seed", "1.5"], "Invalid value for '--seed'"),
        (2, ["--seed", "True"], "Invalid value for '--seed'"),
        (2, ["--first-index", "-1"], "image index -1 | "),
        (2, ["--classes", "1,2", "--first-index", str(2**64 - 1)], "image index 18446744073709551616 | "),
        (2, ["--threads", "0"], "threads 0 | a whole number from 1 to 1024"),
        (2, ["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (2, ["--backend", "cuda"], "backend 'cuda' | auto, tensorrt, tensorrt-rtx, ort-cuda, ort-cpu, openvino"),
        (2, ["--colour"], "No such option: --colour"),
        (4, ["--backend", "tensorrt"], "backend tensorrt: tensorrt is not installed | "),
    ],
)
def test_options(refused: Callable[..., str], tiny_bundle: Path, code: int, options: list[str], text: str) -> None:
    assert text in refused(code, tiny_bundle, *options)


@pytest.mark.parametrize(
    ("options", "code"), [([], 0), (["--schedule", "2"], 2), (["--colour"], 2), (["--backend", "tensorrt"], 4)]
)
def test_the_installed_command(tiny_bundle: Path, tmp_path: Path, options: list[str], code: int) -> None:
    """The real process: one JSON document on standard output, words on standard error, the exit code."""
    command = [FLEXVAR, "generate", tiny_bundle, "-o", tmp_path / "out", "--classes", "1", "--json", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("error" in json.loads(done.stdout)) == (code != 0) and "Traceback" not in done.stderr
    if code == 0:
        assert "generate 10/10: scale 10/10, 16x16 tokens\n" in done.stderr
    else:
        assert "error: got: " in done.stderr or "Error: No such option" in done.stderr


def test_interrupted(tiny_bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C between two images: exit code 130, and every image that is there is whole."""
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
