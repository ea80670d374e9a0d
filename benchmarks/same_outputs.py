"""Whether two versions of this project give the same bytes: graphs, weight files, tokens, images and edits.

    python benchmarks/same_outputs.py record before.json      # in the environment of one version
    python benchmarks/same_outputs.py record after.json       # in that of the other
    python benchmarks/same_outputs.py compare before.json after.json

It exports a small model made by rule and the demo model in every precision, and runs every task with fixed seeds on the
CPU backends. `compare` exits with 1 if any digest differs. It uses public names only, so that old versions run it too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BACKENDS = {
    "fp32": ("ort-cpu", "openvino"),
    "fp16": ("ort-cpu", "openvino"),
    "bf16": ("openvino",),
    "int8": ("ort-cpu",),
    "int8-bf16": ("ort-openvino",),
}
DEMO = Path(__file__).parents[1] / "demo/model"


def digest(*arrays: Any) -> str:
    """sha256 over shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for array in map(np.ascontiguousarray, arrays):
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def bundle_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """sha256 of every file of a bundle but its manifest and its proof, whose container records times."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".onnx", ".data") or path.name.endswith(".onnx.data"):
            yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".npz":
            with np.load(path) as stored:
                yield path.name, digest(*(stored[name] for name in sorted(stored.files)))


def output_digest(output: Any) -> str:
    extra = () if output.decoded is None else (output.decoded,)
    return digest(output.images, *output.tokens, *extra)


def run_digests(bundle: Path, backend: str) -> Iterator[tuple[str, str]]:
    """Every task of a pipeline with fixed seeds."""
    from flexvar_runtime import FlexVARPipeline, Guidance, Sampling

    with FlexVARPipeline.from_bundle(bundle, backend, threads=1) as pipe:
        factor, null = pipe.model.downsampling, pipe.model.null_class
        h, w = pipe.schedule[-1]
        photo = (np.indices((h * factor + 6, w * factor + 2)).sum(0) * 7 % 251).astype(np.uint8)
        photo = np.stack([photo, photo[::-1], photo[:, ::-1]], axis=-1)
        mask = np.zeros(photo.shape[:2], np.uint8)
        mask[: len(mask) // 2, 3:] = 255
        calls: dict[str, Any] = {
            "generate": lambda: pipe([0, 1, null], seed=7, keep_decoded=True),
            "first_index": lambda: pipe([1], seed=7, first_index=1),
            "unguided": lambda: pipe([0, 2], guidance=Guidance(0.0), seed=2**64 - 1),
            "constant": lambda: pipe([3], "1_2_3x5_6x4", Guidance(3.0, "constant"), Sampling(50, 0.5, "none"), 1),
            "argmax": lambda: pipe([1, 1], sampling=Sampling(top_k=1), seed=3),
            "refine": lambda: pipe.edit(photo, "refine", labels=[1], seed=5),
            "inpaint": lambda: pipe.edit(photo, "inpaint", mask=mask, labels=[0, 2], seed=5, paste=True, feather=3),
            "outpaint": lambda: pipe.edit(photo, "outpaint", sides=(0, factor, 0, 0), seed=5),
            "expand": lambda: pipe.edit(photo, "expand", size=(h * factor, 2 * w * factor), seed=5),
        }
        for name, call in calls.items():
            yield name, output_digest(call())
        steps = list(pipe.iter_scales([2], seed=9))
        yield "iter_scales", digest(*(step.tokens for step in steps), steps[1].preview())
        pixels = photo[: h * factor, : w * factor]
        tokens = pipe.encode(pixels)
        yield "encode", digest(tokens, pipe.encode(pixels, (2, 3)))
        yield "decode", digest(pipe.decode(tokens))


def record() -> dict[str, str]:
    """Every digest by name."""
    from flexvar_export.bundle import export_bundle
    from flexvar_export.facts import read_defaults
    from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, write_checkpoints

    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = write_checkpoints(Path(scratch), tiny_transformer(), TINY_TOKENIZER)
        demo = DEMO / "transformer.safetensors", DEMO / "vae.safetensors"
        models: dict[str, Any] = {"tiny": (tiny, {})}
        models["demo"] = demo, {"defaults": read_defaults(DEMO / "defaults.json")}
        for model, (checkpoint, options) in models.items():
            for precision, backends in BACKENDS.items():
                bundle = Path(scratch) / f"{model}-{precision}"
                export_bundle(checkpoint[0], checkpoint[1], bundle, precision=precision, **options)
                for name, value in bundle_digests(bundle):
                    found[f"{model} {precision} {name}"] = value
                for backend in backends:
                    for name, value in run_digests(bundle, backend):
                        found[f"{model} {precision} {backend} {name}"] = value
                print(model, precision, len(found), file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    if options.action == "record":
        options.files[0].write_text(json.dumps(record(), indent=1) + "\n", encoding="ascii")
        return 0
    before, after = (json.loads(path.read_text(encoding="ascii")) for path in options.files)
    different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(f"{len(before.keys() & after.keys()) - len(different)} of {len(before)} digests equal", *different, sep="\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
