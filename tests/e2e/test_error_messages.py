"""The error messages of wrong command lines and calls, compared with a transcript.

Other tests check the type and the exit code of an error. This one shows the wording of all kinds side by side. After a
message was changed on purpose, write the transcript again:

    REWRITE_ERROR_MESSAGES=1 pytest tests/e2e/test_error_messages.py
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexvar_export.bundle_writer import seal
from flexvar_runtime import FlexVARError, FlexVARPipeline, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.bundle.certificate import compared_files
from flexvar_runtime.bundle.manifest import Manifest
from flexvar_runtime.cli.main import main

TRANSCRIPT = Path(__file__).with_name("error_messages.txt")
REWRITE = "REWRITE_ERROR_MESSAGES"
LOGGERS = ("flexvar_runtime", "flexvar_export", "flexvar_bench")

ONE = "generate BUNDLE -o DIR/out --classes 1"
EDIT = "edit BUNDLE --image DIR/photo.png -o DIR/out.png"
USAGE = (
    "nonsense",
    "doctor --nonsense",
    "generate BUNDLE --classes 1",
    f"{ONE} --seed 1.5",
    f"{ONE} --batch-size 0",
)
GENERATE = (
    "generate BUNDLE -o DIR/out",
    "generate DIR/none -o DIR/out --classes 1",
    *(
        f"{ONE} {options}"
        for options in (
            "--classes 11",
            "--classes cat",
            "--schedule 2_4",
            "--schedule 1_500",
            "--schedule 1024px",
            "--schedule 1_2 --size 16x16",
            "--size 24",
            "--size 25x32",
            "--steps 0",
            "--top-k=-1",
            "--top-p 1.5",
            "--cfg nan",
            "--guidance linear",
            "--greedy-scales some",
            "--max-side 0",
            "--seed=-1",
            "--first-index=-1",
            "--threads 0",
            "--backend nonsense",
            "--backend tensorrt",
            "--backend ort-cpu --device cuda",
            "--backend ort-cpu --engines DIR/engines",
            "--deadline-ms 0",
            "--deadline-ms 100 --schedule 1_2",
            "--deadline-ms 100 --progress",
            "--deadline-ms 100 --preset flexvar-d16",
            "--preset flexvar-d16 --from DIR/none.png",
            "--preset flexvar",
            "--from DIR/none.png",
            "--from DIR/photo.png",
            "--preview BUNDLE/preview",
            "--save-arrays DIR/photo.png",
            "--save-arrays DIR",
            "--save-arrays DIR/photo.png/arrays.npz",
        )
    ),
)
EDITS = (
    EDIT,
    "edit BUNDLE --image DIR/none.png -o DIR/out.png --task refine",
    "edit BUNDLE --image DIR/photo.png -o DIR/out.jpg --task refine",
    *(
        f"{EDIT} {options}"
        for options in (
            "--task paint",
            "--task refine --paste",
            "--task refine --strength 2",
            "--task refine --class 1,2",
            "--task refine --size 24x32 --schedule 1_2",
            "--task inpaint",
            "--task inpaint --feather 4",
            "--task inpaint --mask DIR/photo.png --size 25x32",
            "--task outpaint",
            "--task expand",
            "--task expand --size 24x48 --anchor middle",
        )
    ),
)
OTHER_PACKAGES = (
    "export DIR/none.pth --vae DIR/none.pth -o DIR/new.bundle",
    "export DIR/photo.png --vae DIR/photo.png -o BUNDLE",
    "export DIR/photo.png --vae DIR/photo.png -o DIR/new.bundle --precision fp8",
    "build BUNDLE --backend ort-cpu",
    "verify BUNDLE --checkpoint DIR/none.pth --vae DIR/none.pth",
    "train tokenizer --data DIR/none --out DIR/run",
    "train tokenizer --data DIR/none --out DIR/run --config DIR/none.toml",
)


def manifest(change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the parsed manifest of a bundle."""

    def apply(bundle: Path) -> None:
        document = json.loads((bundle / "manifest.json").read_text())
        change(document)
        (bundle / "manifest.json").write_text(json.dumps(document))

    return apply


def flip_a_bit(bundle: Path) -> None:
    data = bytearray((bundle / "step.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "step.onnx.data").write_bytes(data)


def replace_tables(bundle: Path) -> None:
    sealed = Manifest.from_bytes((bundle / "manifest.json").read_bytes())
    (bundle / "tables.npz").write_bytes(b"PK\x03\x04")
    files = compared_files(seal(bundle, sealed).manifest)
    seal(bundle, replace(sealed, parity=replace(sealed.parity, files=files)))


BUNDLES: dict[str, Callable[[Path], object]] = {
    "a changed file": flip_a_bit,
    "a cut file": lambda bundle: os.truncate(bundle / "step.onnx.data", 1000),
    "a missing file": lambda bundle: (bundle / "decode.onnx").unlink(),
    "an extra file": lambda bundle: (bundle / "notes.txt").write_text("x"),
    "no manifest": lambda bundle: (bundle / "manifest.json").unlink(),
    "a cut manifest": lambda bundle: os.truncate(bundle / "manifest.json", 1000),
    "an unknown key": manifest(lambda document: document.update(author="me")),
    "a wrong type": manifest(lambda document: document["model"].update(depth="2")),
    "another schema version": manifest(lambda document: document.update(schema_version=99)),
    "tables that are no tables": replace_tables,
    "bf16": manifest(lambda document: document.update(precision="bf16")),
}

Call = Callable[[FlexVARPipeline], object]
CALLS: dict[str, Call] = {
    "pipe([])": lambda pipe: pipe([]),
    'pipe(["cat"])': lambda pipe: pipe(["cat"]),
    "pipe([1], sampling=0.9)": lambda pipe: pipe([1], sampling=0.9),  # type: ignore[arg-type]
    "pipe([1], seed=[1, 2])": lambda pipe: pipe([1], seed=[1, 2]),
    "pipe([1, 2], seed=[1, 2], first_index=3)": lambda pipe: pipe([1, 2], seed=[1, 2], first_index=3),
    'pipe([1, 2], guidance=[Guidance(2, "ramp"), Guidance(2, "constant")])': lambda pipe: pipe(
        [1, 2], guidance=[Guidance(2, "ramp"), Guidance(2, "constant")]
    ),
    'pipe([1], "1_2", deadline_ms=100)': lambda pipe: pipe([1], "1_2", deadline_ms=100),
    "pipe([1], deadline_ms=100)": lambda pipe: pipe([1], deadline_ms=100),
    'Sampling(top_p="0.9")': lambda pipe: Sampling(top_p="0.9"),  # type: ignore[arg-type]
    "ScaleSchedule.for_size((64, 64), 4)": lambda pipe: ScaleSchedule.for_size((64, 64), 4),
    "pipe.decode(np.zeros((1, 4), int))": lambda pipe: pipe.decode(np.zeros((1, 4), int)),
    "pipe.encode(np.zeros((15, 16, 3), np.uint8))": lambda pipe: pipe.encode(np.zeros((15, 16, 3), np.uint8)),
    'pipe.edit([photo, photo], "refine", labels=[1, 2, 3])': lambda pipe: pipe.edit(
        [np.zeros((16, 16, 3), np.uint8)] * 2, "refine", labels=[1, 2, 3]
    ),
    "pipe.close(); pipe([1])": lambda pipe: (pipe.close(), pipe([1])),
}


class Recorder:
    """Runs what is wrong, and writes down how it was refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, bundle: Path) -> None:
        self.capsys, self.folder, self.bundle = capsys, folder, bundle
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines += ["", f"# {title}", ""]

    def command(self, line: str, *, bundle: Path | None = None, shown: str | None = None) -> None:
        """Run a command line, in which DIR and BUNDLE stand for folders."""
        parts = line.replace("BUNDLE", str(bundle or self.bundle)).replace("DIR", str(self.folder)).split(" ")
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(parts)
        captured = self.capsys.readouterr()
        errors = [text for text in captured.err.splitlines() if text.startswith("error: ")]
        assert end.value.code not in (0, None) and len(errors) == 1, f"{line}: {captured.err}"
        self.record(
            f"$ flexvar {line}" if shown is None else f"$ flexvar {line}  # {shown}",
            f"exit code {end.value.code}",
            errors[0],
        )

    def call(self, name: str, call: Callable[[], object]) -> None:
        with pytest.raises(FlexVARError) as error:
            call()
        self.record(f">>> {name}", f"{type(error.value).__name__}: {error.value}")

    def record(self, *lines: str) -> None:
        self.lines += [*map(self.stable, lines), ""]

    def stable(self, text: str) -> str:
        """The text without what differs between machines and versions."""
        text = re.sub(rf"{re.escape(str(self.bundle))}|{re.escape(str(self.folder))}/\d+\.bundle", "BUNDLE", text)
        text = re.sub(r"\d+\.bundle", "BUNDLE", text.replace(str(self.folder), "DIR"))
        text = re.sub(r"\b([0-9a-f]{64}|[0-9a-f]{16}(?=…))", "SHA256", text)
        text = re.sub(r"\b\d+(\.\d+)? ([KMGT]i?B|bytes)\b", "SIZE", text)
        return re.sub(r"\b\d+\.\d+\.\d+(\.dev\d+)?\b", "VERSION", text)


@pytest.fixture
def recorder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(tmp_path / "photo.png")
    before = {name: logging.getLogger(name).__dict__.copy() for name in LOGGERS}
    yield Recorder(capsys, tmp_path, tiny_bundle)
    for name, state in before.items():
        logging.getLogger(name).__dict__.update(state)


def test_error_messages(recorder: Recorder, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for title, commands in (
        ("Usage", USAGE),
        ("flexvar generate", GENERATE),
        ("flexvar edit", EDITS),
        ("Commands of other packages", OTHER_PACKAGES),
    ):
        recorder.section(title)
        for line in commands:
            recorder.command(line)
    recorder.section("Bundles")
    for number, (name, change) in enumerate(BUNDLES.items()):
        copy = Path(shutil.copytree(tiny_bundle, tmp_path / f"{number}.bundle"))
        change(copy)
        recorder.command("generate BUNDLE -o DIR/out --classes 1 --backend ort-cpu", bundle=copy, shown=name)
        shutil.rmtree(copy)
    recorder.section("Pictures with settings")
    for line in (
        "edit BUNDLE --image DIR/photo.png -o DIR/edited.png --task refine --size 8x8 --schedule 1_2",
        "generate BUNDLE -o DIR/images --classes 1 --schedule 1 --seed 0",
    ):
        with pytest.raises(SystemExit) as end:
            main(line.replace("BUNDLE", str(tiny_bundle)).replace("DIR", str(tmp_path)).split(" "))
        assert end.value.code == 0
    recorder.command("generate BUNDLE -o DIR/out --from DIR/edited.png")
    recorder.command(f"{EDIT} --from DIR/images/000000_class0001.png")
    recorder.section("Memory")
    with monkeypatch.context() as patch:
        patch.setattr(OrtCpu, "available_bytes", lambda self: 2**20)
        recorder.command(f"{ONE} --backend ort-cpu --schedule 1_2", shown="with little free memory")
    recorder.section("Calls")
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        for name, call in CALLS.items():
            recorder.call(name, lambda call=call: call(pipe))  # type: ignore[misc]
    assert not list(tmp_path.glob("out/*")) and not (tmp_path / "out.png").exists()

    found = "\n".join(recorder.lines).strip() + "\n"
    if os.environ.get(REWRITE):
        TRANSCRIPT.write_text(found, encoding="utf-8")
    assert found.splitlines() == TRANSCRIPT.read_text(encoding="utf-8").splitlines()
