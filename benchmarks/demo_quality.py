"""Measures the quality of the demo model: an independent classifier judges the images of its bundles.

    python -m flexvar_bench.demo_quality --model demo/model --work DIR --json demo/model/quality.json

The runtime generates all images on ort-cpu from exported bundles. Two values are measured: the share of images whose
class is recognised, and the Fréchet distance of their features to those of real scenes. Other real scenes give the best
possible values, and a model that was never trained gives the worst. Rows vary the number of steps, the size and the
precision. The rows "4 steps" to "10 steps" have equally many images, because the distance depends on their number. A
later run uses the classifier and the bundles in DIR again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import flexvar_export
import flexvar_ref
from flexvar_export.bundle import export_bundle
from flexvar_export.bundle_writer import write_bundle
from flexvar_export.emulate import emulate_bf16
from flexvar_ref.training import scenes
from flexvar_runtime import Bundle, FlexVARPipeline, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.files.atomic import atomic_write, require_parent
from flexvar_runtime.model.schedule import PUBLISHED

from .scene_classifier import FLOOR_SEED, HELD_OUT_SEED, REFERENCE_SEED, Judged, SceneClassifier, frechet, real, trained

BATCH, SEED = 20, 2026
DEFAULT = PUBLISHED["10"]
OTHER_PRECISIONS = ("fp16", "bf16", "int8", "int8-bf16")
STEPS = {4: "1_3_8_16", 5: "1_2_5_10_16", 7: "1_2_3_5_8_13_16", **{n: PUBLISHED[str(n)] for n in (6, 8, 9, 10)}}
"""Schedules by number of steps: those of the paper, and ours for numbers that it lacks."""
SIZES = {
    "twice the size": "1_2_3_4_5_6_8_10_13_16_23_32",
    "3:2": "1_2x3_3x4_4x6_5x8_6x9_8x12_11x16_16x24",
    "2:3": "1_3x2_4x3_6x4_8x5_9x6_12x8_16x11_24x16",
}
console = Console()
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """The options of all generations: guidance by the ramp rule, and sampling without greedy scales."""

    cfg: float
    top_k: int
    top_p: float

    @property
    def guidance(self) -> Guidance:
        return Guidance(scale=self.cfg, rule="ramp")

    @property
    def sampling(self) -> Sampling:
        return Sampling(top_k=self.top_k, top_p=self.top_p, greedy_scales="none")


@dataclass(frozen=True)
class Row:
    """One row of the result. accuracy: recognised share. frechet: distance to equally many real scenes of that size."""

    name: str
    schedule: str
    height: int
    width: int
    images: int
    accuracy: float
    frechet: float


def generated(bundle: Path, schedule: str, labels: Labels, options: Options) -> NDArray[np.uint8]:
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu", allow_unproved=True) as pipe:  # it may be emulated
        return generated_by(pipe, schedule, labels, options)


def generated_by(
    pipe: FlexVARPipeline, schedule: str | ScaleSchedule, labels: Labels, options: Options
) -> NDArray[np.uint8]:
    """Images (N, H, W, 3) uint8, generated batch by batch."""
    parts = [
        pipe(
            labels[i : i + BATCH].tolist(),
            schedule=schedule,
            guidance=options.guidance,
            sampling=options.sampling,
            seed=SEED,
            first_index=i,
        ).images
        for i in range(0, len(labels), BATCH)
    ]
    return np.concatenate(parts)


def labels_of(images: int) -> Labels:
    """Classes of so many images: all classes in turn."""
    return np.arange(images, dtype=np.int64) % len(scenes.CLASSES)


class Evaluation:
    """Judges sets of images against real scenes of the same size and number."""

    def __init__(self, classifier: SceneClassifier) -> None:
        self.classifier = classifier
        self.references: dict[tuple[int, int, int], Judged] = {}
        self.rows: list[Row] = []

    def reference(self, count: int, height: int, width: int) -> Judged:
        key = count, height, width
        if key not in self.references:
            self.references[key] = self.classifier.judge(*real(REFERENCE_SEED, count, (height, width)))
        return self.references[key]

    def add(self, name: str, schedule: str, images: NDArray[np.uint8]) -> Row:
        count, height, width = images.shape[:3]
        judged = self.classifier.judge(images, labels_of(count))
        distance = frechet(judged.features, self.reference(count, height, width).features)
        row = Row(name, schedule, height, width, count, judged.accuracy, distance)
        self.rows.append(row)
        console.print(f"{name}: {judged.accuracy:.1%} recognised, Fréchet {distance:.2f}", highlight=False)
        return row


def checkpoint_of(model: Path) -> tuple[Path, Path]:
    """The files of transformer and tokenizer."""
    return model / "transformer.safetensors", model / "vae.safetensors"


def digests(model: Path) -> dict[str, str]:
    """The sha256 of each weight file, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint_of(model)}


def exported(model: Path, work: Path, precision: str) -> Path:
    """The bundle of the model in `work`. Its name holds a hash of the weights and of the exporting code."""
    transformer, tokenizer = checkpoint_of(model)
    sources = sorted(Path(flexvar_export.__file__).parent.glob("*.py"))
    tells = [*digests(model).values(), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)]
    key = hashlib.sha256("".join(tells).encode()).hexdigest()[:12]
    out = work / f"{key}-{precision}.bundle"
    if not out.exists():
        export_bundle(transformer, tokenizer, out, precision=precision, class_names=scenes.CLASSES)
    if precision.endswith("bf16"):  # not every CPU has such kernels, so float32 graphs round as bfloat16 does
        emulated = work / f"{key}-{precision}-emulated.bundle"
        if not emulated.exists():
            with write_bundle(emulated) as directory:
                emulate_bf16(Bundle.open(out), directory)
        return emulated
    return out


def untrained(model: Path, work: Path) -> Path:
    """A bundle of the same sizes whose transformer was never trained, with the trained tokenizer."""
    control = work / "untrained"
    control.mkdir(exist_ok=True)
    transformer, tokenizer = flexvar_ref.load(*checkpoint_of(model))
    torch.manual_seed(0)
    first, second = checkpoint_of(control)
    flexvar_ref.save(flexvar_ref.FlexVAR(transformer.config, tokenizer.codebook_VD), first)
    flexvar_ref.save(tokenizer, second)
    return exported(control, work, "fp32")


@dataclass(frozen=True)
class Reconstruction:
    """The tokenizer on held-out scenes. psnr: of the mean squared error, peak 2. usage: share of codes that occur."""

    images: int
    psnr: float
    usage: float
    pixels: NDArray[np.uint8]


def reconstructed(bundle: Path, images: NDArray[np.uint8]) -> Reconstruction:
    outputs, used = [], set[int]()
    with FlexVARPipeline.from_bundle(bundle, backend="ort-cpu") as pipe:
        vocabulary = pipe.bundle.manifest.model.vocabulary
        for i in range(0, len(images), BATCH):
            tokens = pipe.encode(images[i : i + BATCH])
            used |= set(np.unique(tokens).tolist())
            outputs.append(pipe.decode(tokens))
    decoded = np.concatenate(outputs)
    error = ((decoded.astype(np.float64) - images.astype(np.float64)) / 127.5) ** 2
    return Reconstruction(len(images), 10 * math.log10(4 / error.mean()), len(used) / vocabulary, decoded)


def evaluate(model: Path, work: Path, images: int, others: int, options: Options) -> dict[str, Any]:
    """Measure all rows. Returns them as JSON values.

    images: images of each row with the default schedule. others: images of each row that compares steps or sizes, at
    most `images`. Writes the classifier and the bundles into `work`.
    """
    classifier = trained(work / "classifier.safetensors", say=console.print)
    held_out, labels = real(HELD_OUT_SEED, 1200, (64, 64))
    known = classifier.judge(held_out, labels).accuracy
    console.print(f"classifier on {len(labels)} held-out scenes: {known:.2%}", highlight=False)
    fp32 = exported(model, work, "fp32")
    facts = Bundle.open(fp32).manifest.model
    side = ScaleSchedule.parse(DEFAULT)[-1][0] * facts.downsampling
    judge, classes = Evaluation(classifier), labels_of(images)
    floor, _ = real(FLOOR_SEED, images, (side, side))
    judge.add("real scenes", "", floor)
    reconstruction = reconstructed(fp32, floor)
    judge.add("real scenes through the tokenizer", "16", reconstruction.pixels)
    judge.add("untrained control", DEFAULT, generated(untrained(model, work), DEFAULT, classes, options))
    default = generated(fp32, DEFAULT, classes, options)
    judge.add(f"10 steps, {images} images", DEFAULT, default)
    for precision in OTHER_PRECISIONS:
        bundle = exported(model, work, precision)
        judge.add(f"10 steps, {precision}", DEFAULT, generated(bundle, DEFAULT, classes, options))
    judge.add("10 steps, no guidance", DEFAULT, generated(fp32, DEFAULT, classes, replace(options, cfg=0.0)))
    judge.add(f"real scenes, {others}", "", floor[:others])
    for steps, schedule in sorted(STEPS.items(), reverse=True):
        some = default[:others] if schedule == DEFAULT else generated(fp32, schedule, labels_of(others), options)
        judge.add(f"{steps} steps", schedule, some)
    for name, schedule in SIZES.items():
        h, w = (tokens * facts.downsampling for tokens in ScaleSchedule.parse(schedule)[-1])
        judge.add(f"real scenes, {name}", "", real(FLOOR_SEED, others, (h, w))[0])
        judge.add(name, schedule, generated(fp32, schedule, labels_of(others), options))
    _show(judge.rows)
    return {
        "weights": digests(model),
        "classifier_held_out_accuracy": known,
        "classifier_held_out_scenes": len(labels),
        "tokenizer": {name: value for name, value in vars(reconstruction).items() if name != "pixels"},
        "options": {**asdict(options), "rule": "ramp", "greedy_scales": "none", "seed": SEED},
        "rows": [asdict(row) for row in judge.rows],
    }


def _show(rows: list[Row]) -> None:
    table = Table("images", "pixels", "recognised", "Fréchet distance", "schedule")
    for row in rows:
        size = f"{row.height}x{row.width}"
        table.add_row(row.name, size, f"{row.accuracy:.1%}", f"{row.frechet:.2f}", row.schedule)
    console.print(table)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that evaluations of the demo model have in common."""
    parser.add_argument(
        "--model", type=Path, required=True, help="Folder with transformer.safetensors and vae.safetensors."
    )
    parser.add_argument("--work", type=Path, required=True, help="Folder for the classifier and the bundles.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    parser.add_argument("--cfg", type=float, default=2.5, help="Guidance scale.")
    parser.add_argument("--top-k", type=int, default=0, help="Tokens to sample from. 0 is all.")
    parser.add_argument("--top-p", type=float, default=0.8, help="Probability mass to sample from.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch.")


def prepare(arguments: argparse.Namespace) -> Options:
    """Check that the result can be written, make the work folder and set the threads. Returns the options."""
    if arguments.json:
        require_parent(arguments.json.absolute())
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    return Options(arguments.cfg, arguments.top_k, arguments.top_p)


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write the result as JSON, unless `path` is None."""
    if path is not None:
        with atomic_write(path, force=True) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--images", type=int, default=2000, help="Images of each row. Default: 2000.")
    parser.add_argument(
        "--others", type=int, default=240, help="Images of each row with other steps or another size. Default: 240."
    )
    arguments = parser.parse_args()
    if arguments.others > arguments.images:
        parser.error(f"--others is {arguments.others}, but it must be at most --images ({arguments.images}).")
    options = prepare(arguments)
    result = evaluate(arguments.model, arguments.work, arguments.images, arguments.others, options)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
