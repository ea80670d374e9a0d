"""Copy two trained runs to the demo model: weights in float16, sizes, class names and the curves of both runs.

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
    """Write the averaged weights of a run in float16, and copy the model's sizes and the curves beside them."""
    state = {key: value.half() for key, value in load_file(run / "model.safetensors").items()}
    overflown = [key for key, value in state.items() if not torch.isfinite(value).all()]
    if overflown:
        raise SystemExit(f"These weights are too large for float16: {', '.join(overflown)}. Pack them in float32.")
    save_file(state, out / f"{name}.safetensors", metadata={"license": "MIT", "format": "pt"})
    shutil.copy(run / "model.json", out / f"{name}.json")
    shutil.copy(run / "curves.png", out / f"{name}_curves.png")


def trained_together(tokenizer: Path, transformer: Path) -> tuple[Path, Path]:
    """Return the tokenizer's weights, and the copy of them that the transformer's run keeps."""
    return tokenizer / "model.safetensors", transformer / "tokenizer.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="folder of a flexvar train tokenizer run")
    parser.add_argument("transformer", type=Path, help="folder of a flexvar train transformer run")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder to write to")
    arguments = parser.parse_args()
    ours, theirs = (load_file(path) for path in trained_together(arguments.tokenizer, arguments.transformer))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        raise SystemExit(
            f"The transformer was not trained on the tokenizer in {arguments.tokenizer}. Pass the run of its tokenizer."
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    pack(arguments.tokenizer, "vae", arguments.out)
    pack(arguments.transformer, "transformer", arguments.out)
    shutil.copy(arguments.transformer / "classes.json", arguments.out / "classes.json")
    sheet = sorted((arguments.tokenizer / "samples").glob("step_*.png"))[-1]
    shutil.copy(sheet, arguments.out / "reconstructions.png")


if __name__ == "__main__":
    main()
