"""Trained runs to the demo model: weights in half precision, sizes, class names and the curves of both runs.

python demo/pack_model.py runs/tokenizer runs/transformer
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parent / "model"


def pack(run: Path, name: str, out: Path) -> None:
    """The averaged weights of a run, float16, with their sizes beside them."""
    state = {key: value.half() for key, value in load_file(run / "model.safetensors").items()}
    overflown = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if overflown:
        raise SystemExit(f"got {', '.join(overflown)} beyond float16; expected weights that fit; fix: keep float32")
    save_file(state, out / f"{name}.safetensors", metadata={"license": "MIT", "format": "pt"})
    shutil.copy(run / "model.json", out / f"{name}.json")
    shutil.copy(run / "curves.png", out / f"{name}_curves.png")


def trained_together(tokenizer: Path, transformer: Path) -> tuple[Path, Path]:
    """The tokenizer, and the copy of it that the transformer's run keeps."""
    return tokenizer / "model.safetensors", transformer / "tokenizer.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="run of flexvar train tokenizer")
    parser.add_argument("transformer", type=Path, help="run of flexvar train transformer")
    parser.add_argument("--out", type=Path, default=MODEL)
    arguments = parser.parse_args()
    ours, theirs = (load_file(path) for path in trained_together(arguments.tokenizer, arguments.transformer))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise SystemExit("got two runs apart; expected the tokenizer that the transformer was trained on; fix: pass it")
    arguments.out.mkdir(parents=True, exist_ok=True)
    pack(arguments.tokenizer, "vae", arguments.out)
    pack(arguments.transformer, "transformer", arguments.out)
    shutil.copy(arguments.transformer / "classes.json", arguments.out / "classes.json")
    sheet = sorted((arguments.tokenizer / "samples").glob("step_*.png"))[-1]
    shutil.copy(sheet, arguments.out / "reconstructions.png")


if __name__ == "__main__":
    main()
