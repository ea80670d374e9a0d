"""The files that fuzzed command lines and calls name, all of them small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
LARGE = 2**16  # bytes; larger files are copied only for a case that names them
RECORDS = 12  # of the results of a benchmark: drawing them all takes seconds
TOKENIZER = "tokenizer.toml"
TRANSFORMER = "transformer.toml"


def make_desk(folder: Path, bundle: Path, checkpoints: tuple[Path, Path]) -> Path:
    """Write the files. bundle: of the tiny model. checkpoints: its transformer and tokenizer."""
    from flexvar_runtime import FlexVARPipeline
    from flexvar_runtime.pictures.png import save_png

    folder.mkdir(parents=True)
    shutil.copytree(bundle, folder / "tiny.bundle")
    for source, name in zip(checkpoints, ("transformer.pth", "vae.pth"), strict=True):
        shutil.copy(source, folder / name)
    with FlexVARPipeline.from_bundle(bundle, "ort-cpu", threads=1) as pipeline:
        made = pipeline([3], "1_2_4", seed=5)
        save_png(folder / "made.png", made.images[0], made.settings[0].to_json())
        edited = pipeline.edit(made.images[0], "refine", seed=5)
        save_png(folder / "edited.png", edited.images[0], edited.settings[0].to_json())
        classes = pipeline.model.null_class
    rng = np.random.default_rng(0)
    for number in range(4):
        label = folder / "photos" / f"class{number % 2}"
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(label / f"{number}.png")
    _make_evaluation(folder, rng)
    photo = rng.integers(0, 256, (24, 40, 4), np.uint8)
    Image.fromarray(photo[..., :3]).save(folder / "photo.jpg")
    Image.fromarray(photo).save(folder / "clear.png")
    Image.fromarray(photo[..., 0] // 128 * 255).save(folder / "mask.png")
    for kind in (TOKENIZER, TRANSFORMER):
        text = (ROOT / "configs" / f"smoke_{kind}").read_text(encoding="utf-8")
        for setting, value in (("samples", 8), ("held_out", 4), ("steps", 1), ("batch", 2), ("size", 16)):
            text = re.sub(rf"^{setting} = \d+$", f"{setting} = {value}", text, flags=re.MULTILINE)
        (folder / kind).write_text(text, encoding="utf-8")
    documents = {
        "names.json": [f"class {number}" for number in range(classes)],
        "defaults.json": {"schedule": "1_2_4", "top_k": 5, "top_p": 0.8},
        "quality.json": {"rows": [{"name": "a", "schedule": "1_2_4", "height": 16, "width": 16, "frechet": 1.5}]},
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    model = '[[model]]\nname = "a"\nbundle = "tiny.bundle"\nsteps = [4]\nbatches = [1]\nrepeats = 1\nrequests = 0\n'
    (folder / "suite.toml").write_text(model, encoding="utf-8")
    results = (ROOT / "benchmarks/results/cpu_2core_zen4_demo_d16_2026-11-26.jsonl").read_text(encoding="utf-8")
    (folder / "results.jsonl").write_text("".join(results.splitlines(keepends=True)[:RECORDS]), encoding="utf-8")
    (folder / "deep.json").write_text("[" * 5000, encoding="ascii")
    (folder / "noise.bin").write_bytes(rng.bytes(999))
    (folder / "empty.txt").touch()
    (folder / "folder").mkdir()
    return folder


def _make_evaluation(folder: Path, rng: np.random.Generator) -> None:
    """A feature network, real pictures, a reference, and a run of 8 images."""
    sys.path.append(str(ROOT / "tests" / "evaluation"))
    from tiny_network import write_tiny_network

    write_tiny_network(folder / "tiny.onnx")
    np.savez(folder / "real.npz", rng.integers(0, 256, (8, 16, 16, 3), np.uint8))
    network = ("--network", str(folder / "tiny.onnx"))
    _flexvar("reference", str(folder / "real.npz"), *network, "-o", str(folder / "real.ref"))
    options = ("--count", "8", "--schedule", "1_2_4", "--backend", "ort-cpu", "--threads", "1")
    _flexvar("sample", str(folder / "tiny.bundle"), "-o", str(folder / "run"), *network, *options)


def _flexvar(*arguments: str) -> None:
    flexvar = Path(sys.executable).parent / "flexvar"
    subprocess.run([flexvar, "evaluate", *arguments], check=True, capture_output=True)


def lay_out(desk: Path, case: Path, words: list[str]) -> None:
    """Copy the desk to a new folder `case`. Large files are left out unless one of the words names them."""
    said = "\n".join(words)

    def unnamed(folder: str, names: list[str]) -> set[str]:
        if Path(folder) != desk:
            return set()
        return {name for name in names if Path(name).stem not in said and _size(desk / name) > LARGE}

    shutil.copytree(desk, case, ignore=unnamed)


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    place, bundle, *checkpoints = map(Path, sys.argv[1:])
    make_desk(place, bundle, (checkpoints[0], checkpoints[1]))
