"""Measures the quality of edits of the demo model, with the independent classifier and by comparing pixels.

    python -m flexvar_bench.edit_quality --model demo/model --work DIR --json demo/model/edits.json \\
        --sheets docs/editing

The runtime edits held-out scenes on ort-cpu with the exported fp32 bundle. Measured are:

- of inpainting: the recognised share, the seam and the pixels that stay,
- of refined small scenes: the Fréchet distance, compared with bicubic upsampling,
- of expansions and of other proportions: the recognised share.

A later run uses the classifier and the bundle in DIR again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from flexvar_ref.training import scenes
from flexvar_runtime import FlexVARPipeline, GenerationOutput, ScaleSchedule
from flexvar_runtime.files.atomic import atomic_write

from .demo_quality import (
    BATCH,
    DEFAULT,
    SEED,
    Options,
    common_arguments,
    digests,
    exported,
    generated_by,
    labels_of,
    prepare,
    write_result,
)
from .scene_classifier import HELD_OUT_SEED, REFERENCE_SEED, SceneClassifier, frechet, real, trained

Pixels = NDArray[np.uint8]
SIDE, SMALL = 64, 16  # side in pixels of a scene, and of a small scene to refine
HELD_OUT_FROM = 5000  # behind the scenes that test the classifier
FEATHER = 4
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
# height : width
PROPORTIONS = {"1:2": (64, 128), "2:3": (64, 96), "3:2": (96, 64), "2:1": (128, 64), "twice": (128, 128)}
console = Console()


def psnr(one: Pixels, other: Pixels) -> float:
    """PSNR in dB, peak 255."""
    error = float(((one.astype(np.float64) - other.astype(np.float64)) ** 2).mean())
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def centred_hole(size: int = SIDE) -> NDArray[np.bool_]:
    """A mask (size, size) with a centred hole of half the side."""
    mask = np.zeros((size, size), bool)
    mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
    return mask


def seam(images: Pixels, mask: NDArray[np.bool_]) -> float:
    """Mean absolute difference between neighbouring pixels across the edge of a mask."""
    values = images.astype(np.float64)
    across = [
        np.abs(np.diff(values, axis=axis))[:, np.diff(mask.astype(np.int8), axis=axis - 1) != 0] for axis in (1, 2)
    ]
    return float(np.concatenate([part.reshape(-1) for part in across]).mean())


class Edits:
    """Edits of many scenes with one pipeline."""

    def __init__(self, pipe: FlexVARPipeline, options: Options) -> None:
        self.pipe, self.options = pipe, options

    def edited(self, pictures: Pixels, labels: NDArray[np.int64] | None, task: str, **settings: Any) -> Pixels:
        """Edit scenes (N, H, W, 3) in batches. labels: None edits without a class."""

        def batch(start: int) -> GenerationOutput:
            some = list(pictures[start : start + BATCH])
            return self.pipe.edit(
                some,
                task,
                labels=None if labels is None else labels[start : start + BATCH].tolist(),
                guidance=None if labels is None else self.options.guidance,
                sampling=self.options.sampling,
                seed=SEED,
                first_index=start,
                **settings,
            )

        return np.concatenate([batch(start).images for start in range(0, len(pictures), BATCH)])

    def generated(self, labels: NDArray[np.int64], size: tuple[int, int]) -> Pixels:
        """Generate images with as many steps as the default schedule, or two more at twice the size (see the card)."""
        factor, steps = self.pipe.model.downsampling, len(ScaleSchedule.parse(DEFAULT))
        beyond = size[0] * size[1] > 2 * SIDE * SIDE
        schedule = ScaleSchedule.for_size((size[0] // factor, size[1] // factor), steps + 2 * beyond)
        return generated_by(self.pipe, schedule, labels, self.options)


def inpainting(edits: Edits, judge: SceneClassifier, count: int) -> tuple[dict[str, Any], list[Pixels]]:
    """Fill a centred hole in held-out scenes, with and without their class."""
    pictures, labels = real(HELD_OUT_SEED, count, (SIDE, SIDE), start=HELD_OUT_FROM)
    mask = centred_hole()
    rebuilt = _reconstructed(edits.pipe, pictures)
    holes = pictures.copy()
    holes[:, mask] = 128
    rows: dict[str, Any] = {
        "images": count,
        "accuracy of the scenes": judge.judge(pictures, labels).accuracy,
        "accuracy through the tokenizer": judge.judge(rebuilt, labels).accuracy,
        "accuracy with the hole in grey": judge.judge(holes, labels).accuracy,
    }
    sheet = [holes]
    for name, classes in (("with class", labels), ("without class", None)):
        plain = edits.edited(pictures, classes, "inpaint", mask=mask)
        pasted = edits.edited(pictures, classes, "inpaint", mask=mask, paste=True, feather=FEATHER)
        outside = beyond(mask, FEATHER)
        rows[name] = {
            "accuracy": judge.judge(plain, labels).accuracy,
            "accuracy, pasted": judge.judge(pasted, labels).accuracy,
            "seam": seam(plain, mask) / seam(pictures, mask),
            "seam, pasted": seam(pasted, mask) / seam(pictures, mask),
            "psnr outside against the tokenizer": psnr(plain[:, outside], rebuilt[:, outside]),
            "pixels beyond the feather that differ, pasted": int((pasted[:, outside] != pictures[:, outside]).sum()),
        }
        sheet.append(pasted)
    return rows, [pictures, *sheet]


def refining(edits: Edits, judge: SceneClassifier, count: int) -> tuple[dict[str, Any], list[Pixels]]:
    """Refine scenes of a quarter of the side for each strength, and compare with bicubic upsampling."""
    pictures, labels = real(HELD_OUT_SEED, count, (SIDE, SIDE), start=HELD_OUT_FROM)
    reference = judge.judge(real(REFERENCE_SEED, count, (SIDE, SIDE))[0], labels).features
    small = _resized(pictures, SMALL, Image.Resampling.BOX)
    bicubic = _resized(small, SIDE, Image.Resampling.BICUBIC)

    def row(images: Pixels) -> dict[str, float]:
        judged = judge.judge(images, labels)
        back = _resized(images, SMALL, Image.Resampling.BOX)
        return {
            "frechet": frechet(judged.features, reference),
            "accuracy": judged.accuracy,
            "psnr": psnr(back, small),
        }

    rows: dict[str, Any] = {"images": count, "bicubic": row(bicubic), "scenes": row(pictures)}
    shown = [pictures, bicubic]
    for strength in (None, *STRENGTHS):
        images = edits.edited(small, labels, "refine", size=(SIDE, SIDE), strength=strength)
        name = "the default" if strength is None else f"strength {strength:g}"
        rows[name] = row(images)
        shown.append(images)
        console.print(f"refine, {name}: {rows[name]}", highlight=False)
    return rows, shown


def sizes(edits: Edits, judge: SceneClassifier, count: int) -> tuple[dict[str, Any], dict[str, Pixels]]:
    """Expand held-out scenes, and generate images of other proportions."""
    pictures, scene_labels = real(HELD_OUT_SEED, count, (SIDE, SIDE), start=HELD_OUT_FROM)
    rows: dict[str, Any] = {"images": count}
    shown: dict[str, Pixels] = {}
    for name, size in (("expanded to twice the width", (64, 128)), ("expanded to 3:2", (64, 96))):
        shown[name] = edits.edited(pictures, scene_labels, "expand", size=size, paste=True, feather=FEATHER)
        rows[name] = judge.judge(shown[name], scene_labels).accuracy
    labels = labels_of(count)
    for name, size in PROPORTIONS.items():
        images = edits.generated(labels, size)
        scenes_of_size, _ = real(REFERENCE_SEED, count, size)
        floor = judge.judge(scenes_of_size, labels)
        judged = judge.judge(images, labels)
        rows[f"generated {name}"] = {
            "accuracy": judged.accuracy,
            "accuracy of scenes": floor.accuracy,
            "frechet": frechet(judged.features, floor.features),
        }
        shown[f"generated {name}"] = images
        console.print(f"generated {name}: {rows[f'generated {name}']}", highlight=False)
    return rows, shown


def _reconstructed(pipe: FlexVARPipeline, pictures: Pixels) -> Pixels:
    parts = [pipe.decode(pipe.encode(pictures[i : i + BATCH])) for i in range(0, len(pictures), BATCH)]
    return np.concatenate(parts)


def beyond(mask: NDArray[np.bool_], feather: int) -> NDArray[np.bool_]:
    """A mask of the pixels farther than `feather` from a rectangular mask."""
    far = np.ones_like(mask)
    ranges = []
    for axis in (1, 0):
        inside = np.where(mask.any(axis))[0]
        ranges.append(slice(max(0, int(inside[0]) - feather), int(inside[-1]) + feather + 1))
    far[tuple(ranges)] = False
    return far


def _resized(images: Pixels, side: int, how: Image.Resampling) -> Pixels:
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), how)) for image in images])


def sheet(rows: list[Pixels], columns: int, path: Path, zoom: int = 2) -> None:
    """Write rows of pictures of one size as one PNG, enlarged by `zoom`, with white between them."""
    frame = ((0, 0), (2, 2), (2, 2), (0, 0))
    framed = [np.pad(row[:columns], frame, constant_values=255) for row in rows]
    whole = np.concatenate([np.concatenate(row, axis=1) for row in framed])
    large = Image.fromarray(whole).resize((whole.shape[1] * zoom, whole.shape[0] * zoom), Image.Resampling.NEAREST)
    with atomic_write(path, force=True) as partial:
        large.save(partial, format="PNG", optimize=True)


def evaluate(
    model: Path, work: Path, options: Options, counts: tuple[int, int, int], sheets: Path | None
) -> dict[str, Any]:
    """Measure all three parts. counts: scenes of each part. Writes contact sheets into `sheets`."""
    judge = trained(work / "classifier.safetensors", say=console.print)
    with FlexVARPipeline.from_bundle(exported(model, work, "fp32"), backend="ort-cpu") as pipe:
        edits = Edits(pipe, options)
        parts: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
            "inpaint": lambda: inpainting(edits, judge, counts[0]),
            "refine": lambda: refining(edits, judge, counts[1]),
            "sizes": lambda: sizes(edits, judge, counts[2]),
        }
        results: dict[str, Any] = {"weights": digests(model), "seed": SEED}
        pictures = {}
        for name, run in parts.items():
            results[name], pictures[name] = run()
            console.print(name, results[name], highlight=False)
    if sheets is not None:
        columns = len(scenes.CLASSES)
        sheet(pictures["inpaint"], columns, sheets / "inpaint.png")
        sheet(pictures["refine"], columns, sheets / "refine.png")
        for name, images in pictures["sizes"].items():
            file = name.replace(" ", "_").replace(":", "to")
            sheet([images[:6], images[6:12]], 6, sheets / f"{file}.png")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--counts", type=int, nargs=3, default=(100, 200, 120), help="Scenes of each part.")
    parser.add_argument("--sheets", type=Path, help="Folder for contact sheets.")
    arguments = parser.parse_args()
    options = prepare(arguments)
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
    result = evaluate(arguments.model, arguments.work, options, tuple(arguments.counts), arguments.sheets)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
