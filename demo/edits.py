"""Measures the quality of edits of the demo model, with the independent classifier and by comparing pixels.

    python demo/edits.py --model demo/model --work runs/quality --json demo/model/edits.json --sheets docs/editing

Needs the extras cpu, export and evaluate. Held-out scenes are edited on ort-cpu with the exported fp32 bundle, and
`flexvar_evaluation.editing` measures the results:

- of inpainting: the recognised share, the seam and the pixels that stay,
- of refined small scenes: the Fréchet distance, compared with bicubic interpolation,
- of expansions and of other proportions: the recognised share.

A later run uses the network and the bundle in the folder of --work again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_options import (
    BATCH,
    DEFAULT,
    SEED,
    common_arguments,
    prepare,
    real_features,
    real_reference,
    write_result,
)
from exporting import digests, exported
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from scene_classifier import HELD_OUT_SEED, REFERENCE_SEED, real
from scene_network import network_file

from flexvar_evaluation.editing.editor import EditOptions, Editor, LabelledPictures
from flexvar_evaluation.editing.inpainting import Filled, inpainting
from flexvar_evaluation.editing.refining import Enlarged, refining
from flexvar_evaluation.editing.sizes import expanding, generating
from flexvar_evaluation.judging import recognised_share
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_ref.training import scenes
from flexvar_runtime import FlexVARPipeline, ScaleSchedule
from flexvar_runtime.files.atomic import atomic_write

Pixels = NDArray[np.uint8]
SIDE = 64  # pixels of a scene
HELD_OUT_FROM = 5000  # behind the scenes that test the classifier
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
# height : width
EXPANSIONS = {"expanded to twice the width": (64, 128), "expanded to 3:2": (64, 96)}
PROPORTIONS = {"1:2": (64, 128), "2:3": (64, 96), "3:2": (96, 64), "2:1": (128, 64), "twice": (128, 128)}
console = Console()


@dataclass(frozen=True)
class Part:
    """One part of the result. values: for JSON. sheets: rows of pictures by the name of a contact sheet."""

    values: dict[str, Any]
    sheets: dict[str, list[Pixels]]


def held_out(count: int) -> LabelledPictures:
    """Scenes that neither the model nor the classifier has seen."""
    return LabelledPictures(*real(HELD_OUT_SEED, count, (SIDE, SIDE), start=HELD_OUT_FROM))


def inpaint_part(editor: Editor, network: FeatureNetwork, count: int) -> Part:
    """A centred hole in held-out scenes, filled with and without their class."""
    pictures = held_out(count)
    result = inpainting(editor, network, pictures)

    def row(filled: Filled) -> dict[str, float]:
        return {
            "accuracy": filled.recognised,
            "accuracy, pasted": filled.recognised_pasted,
            "seam": filled.seam,
            "seam, pasted": filled.seam_pasted,
            "psnr outside against the tokenizer": filled.psnr_outside,
            "pixels beyond the feather that differ, pasted": filled.changed,
        }

    values = {
        "images": count,
        "accuracy of the scenes": result.recognised,
        "accuracy through the tokenizer": result.recognised_reconstructed,
        "accuracy with the hole in grey": result.recognised_with_hole,
        "with class": row(result.with_class),
        "without class": row(result.without_class),
    }
    rows = [pictures.pixels, result.holes, result.with_class.pixels, result.without_class.pixels]
    return Part(values, {"inpaint": rows})


def refine_part(editor: Editor, network: FeatureNetwork, count: int) -> Part:
    """Held-out scenes of a quarter of the side, refined with each strength."""
    pictures, reference = held_out(count), real_reference(network, count, (SIDE, SIDE))
    result = refining(editor, network, pictures, reference, STRENGTHS)

    def row(enlarged: Enlarged) -> dict[str, float]:
        return {"frechet": enlarged.frechet, "accuracy": enlarged.recognised, "psnr": enlarged.psnr}

    values = {"images": count, "bicubic": row(result.bicubic), "scenes": row(result.original)}
    for strength, enlarged in result.by_strength.items():
        values["the default" if strength is None else f"strength {strength:g}"] = row(enlarged)
    refined = [enlarged.pixels for enlarged in result.by_strength.values()]
    return Part(values, {"refine": [result.original.pixels, result.bicubic.pixels, *refined]})


def sizes_part(editor: Editor, network: FeatureNetwork, count: int) -> Part:
    """Held-out scenes that are expanded, and images of other proportions that are generated."""
    pictures = held_out(count)
    values, sheets = dict[str, Any](images=count), dict[str, list[Pixels]]()

    def show(name: str, pixels: Pixels) -> None:
        sheets[name.replace(" ", "_").replace(":", "to")] = [pixels[:6], pixels[6:12]]

    for name, size in EXPANSIONS.items():
        expanded = expanding(editor, network, pictures, size)
        values[name] = expanded.recognised
        show(name, expanded.pixels)
    for proportion, size in PROPORTIONS.items():
        name, reference = f"generated {proportion}", real_reference(network, count, size)
        generated = generating(editor, network, schedule_for(editor.pipe, size), count, reference)
        of_scenes = recognised_share(real_features(network, REFERENCE_SEED, count, size), network.head)
        values[name] = {
            "accuracy": generated.recognised,
            "accuracy of scenes": of_scenes,
            "frechet": generated.frechet,
        }
        show(name, generated.pixels)
    return Part(values, sheets)


def schedule_for(pipe: FlexVARPipeline, size: tuple[int, int]) -> ScaleSchedule:
    """As many steps as the default schedule, or two more at twice the size (see the card). size: in pixels."""
    factor, beyond = pipe.model.downsampling, size[0] * size[1] > 2 * SIDE * SIDE
    return ScaleSchedule.for_size((size[0] // factor, size[1] // factor), len(DEFAULT) + 2 * beyond)


def sheet(rows: list[Pixels], columns: int, path: Path, zoom: int = 2) -> None:
    """Write rows of pictures of one size as one PNG, enlarged by `zoom`, with white between them."""
    frame = ((0, 0), (2, 2), (2, 2), (0, 0))
    framed = [np.pad(row[:columns], frame, constant_values=255) for row in rows]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in framed])
    large = Image.fromarray(whole).resize((whole.shape[1] * zoom, whole.shape[0] * zoom), Image.Resampling.NEAREST)
    with atomic_write(path, force=True) as partial:
        large.save(partial, format="PNG", optimize=True)


def evaluate(
    bundle: Path, network: FeatureNetwork, options: EditOptions, counts: tuple[int, int, int], sheets: Path | None
) -> dict[str, Any]:
    """Measure all three parts. counts: scenes of each part. Writes contact sheets into `sheets`."""
    values = dict[str, Any]()
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu") as pipe:
        editor = Editor(pipe, options)
        parts = {"inpaint": inpaint_part, "refine": refine_part, "sizes": sizes_part}
        for (name, measure), count in zip(parts.items(), counts, strict=True):
            part = measure(editor, network, count)
            values[name] = part.values
            console.print(name, part.values, highlight=False)
            if sheets is not None:
                for file, rows in part.sheets.items():
                    sheet(rows, len(scenes.CLASSES), sheets / f"{file}.png")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--counts", type=int, nargs=3, default=(100, 200, 120), help="Scenes of each part.")
    parser.add_argument("--sheets", type=Path, help="Folder for contact sheets.")
    arguments = parser.parse_args()
    options = prepare(arguments)
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
    edits = EditOptions(guidance=options.guidance, sampling=options.sampling, seed=SEED, batch=BATCH)
    bundle = exported(arguments.model, arguments.work, "fp32")
    with FeatureNetwork.open(network_file(arguments.work, say=console.print)) as network:
        values = evaluate(bundle, network, edits, tuple(arguments.counts), arguments.sheets)
    write_result(arguments.json, {"weights": digests(arguments.model), "seed": SEED, **values})


if __name__ == "__main__":
    main()
