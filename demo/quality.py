"""Measures the quality of the demo model: an independent classifier judges the images of its bundles.

    python demo/quality.py --model demo/model --work runs/quality --json demo/model/quality.json

Needs the extras cpu, export and evaluate. `flexvar_evaluation` samples all images on ort-cpu from exported bundles, and
computes two metrics: the share of images whose class is recognised, and the Fréchet distance of their features to those
of as many real scenes, with its 95 % confidence interval. Other real scenes give the best possible metrics, and a model
that was never trained gives the worst.

Rows vary the number of steps, the size and the precision. The rows "4 steps" to "10 steps" have equally many images,
because the distance depends on their number. The precisions are also compared with fp32 image by image, because all
have the same classes and seeds. A later run continues in the folder of --work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bundle_outputs import pixels_of, reconstructed, sampled
from evaluation_options import (
    DEFAULT,
    SEED,
    Options,
    common_arguments,
    prepare,
    real_features,
    real_reference,
    write_result,
)
from exporting import digests, exported, untrained
from rich.console import Console
from rich.table import Table
from scene_classifier import FLOOR_SEED, HELD_OUT_SEED, real
from scene_network import network_file

from flexvar_evaluation.features import FEWEST_IMAGES, LoadedFeatures
from flexvar_evaluation.judging import features_of, first_of, recognised_share
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.reference import Reference
from flexvar_evaluation.scoring import compare, influences_on_fid, metrics_of
from flexvar_runtime.model.schedule import PUBLISHED

HELD_OUT = 1200  # scenes that test the classifier
OTHER_PRECISIONS = ("fp16", "bf16", "int8", "int8-bf16")
STEPS = {4: "1_3_8_16", 5: "1_2_5_10_16", 7: "1_2_3_5_8_13_16", **{n: PUBLISHED[str(n)] for n in (6, 8, 9, 10)}}
"""Schedules by number of steps: those of the paper, and ours for numbers that it lacks."""
SIZES = {
    "twice the size": "1_2_3_4_5_6_8_10_13_16_23_32",
    "3:2": "1_2x3_3x4_4x6_5x8_6x9_8x12_11x16_16x24",
    "2:3": "1_3x2_4x3_6x4_8x5_9x6_12x8_16x11_24x16",
}
Pair = tuple[float, float]
console = Console()


@dataclass(frozen=True, kw_only=True)
class Against:
    """The difference in Fréchet distance to fp32, image by image. significant: whether the interval leaves out 0."""

    difference: float
    interval: Pair
    significant: bool


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the result. accuracy: recognised share. frechet: distance to equally many real scenes of that size."""

    name: str
    schedule: str
    height: int
    width: int
    images: int
    accuracy: float
    frechet: float
    frechet_interval: Pair
    against_fp32: Against | None

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        if self.against_fp32 is None:
            del data["against_fp32"]
        return data


class Evaluation:
    """Judges sets of images against real scenes of the same size and number."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self.references: dict[tuple[int, Sequence[int]], Reference] = {}
        self.rows: list[Row] = []

    def reference(self, count: int, size: tuple[int, int]) -> Reference:
        if (count, size) not in self.references:
            self.references[count, size] = real_reference(self.network, count, size)
        return self.references[count, size]

    def add(
        self,
        name: str,
        schedule: str,
        features: LoadedFeatures,
        size: tuple[int, int],
        fp32: LoadedFeatures | None = None,
    ) -> None:
        """Add a row. fp32: features of the same images in fp32, to compare with."""
        reference = self.reference(len(features.pool), size)
        influences = influences_on_fid(features, reference)
        metrics, against = metrics_of(features, reference, influences), None
        assert metrics.recognised is not None
        if fp32 is not None:
            paired = compare(influences, influences_on_fid(fp32, reference))
            difference = paired.difference
            bounds = difference.low, difference.high
            against = Against(difference=difference.value, interval=bounds, significant=paired.significant)
        row = Row(
            name=name,
            schedule=schedule,
            height=size[0],
            width=size[1],
            images=metrics.images,
            accuracy=metrics.recognised,
            frechet=metrics.fid.value,
            frechet_interval=(metrics.fid.low, metrics.fid.high),
            against_fp32=against,
        )
        self.rows.append(row)
        console.print(f"{name}: {row.accuracy:.1%} recognised, Fréchet {row.frechet:.2f}", highlight=False)


def evaluate(
    model: Path, work: Path, network: FeatureNetwork, images: int, others: int, options: Options
) -> dict[str, Any]:
    """Measure all rows. Returns them as JSON values.

    images: images of each row with the default schedule. others: images of each row that compares steps or sizes, at
    most `images`. Writes the bundles and the runs into `work`.
    """
    known = recognised_share(real_features(network, HELD_OUT_SEED, HELD_OUT, (64, 64)), network.head)
    console.print(f"classifier on {HELD_OUT} held-out scenes: {known:.2%}", highlight=False)
    fp32, judge, default = exported(model, work, "fp32"), Evaluation(network), str(DEFAULT)

    def generated(bundle: Path, schedule: str, count: int, options: Options = options) -> LoadedFeatures:
        return sampled(bundle, network, schedule, count, options, work)

    size = pixels_of(fp32, default)
    floor, labels = real(FLOOR_SEED, images, size)
    floor_features = features_of(network, floor, labels)
    judge.add("real scenes", "", floor_features, size)
    reconstruction = reconstructed(fp32, floor)
    through = features_of(network, reconstruction.pixels, labels)
    judge.add("real scenes through the tokenizer", str(DEFAULT[-1][0]), through, size)
    judge.add("untrained control", default, generated(untrained(model, work), default, images), size)
    exact = generated(fp32, default, images)
    judge.add(f"10 steps, {images} images", default, exact, size)
    for precision in OTHER_PRECISIONS:
        features = generated(exported(model, work, precision), default, images)
        judge.add(f"10 steps, {precision}", default, features, size, exact)
    judge.add("10 steps, no guidance", default, generated(fp32, default, images, replace(options, cfg=0.0)), size)
    judge.add(f"real scenes, {others}", "", first_of(floor_features, others), size)
    for steps, schedule in sorted(STEPS.items(), reverse=True):
        some = first_of(exact, others) if schedule == default else generated(fp32, schedule, others)
        judge.add(f"{steps} steps", schedule, some, size)
    for name, schedule in SIZES.items():
        size = pixels_of(fp32, schedule)
        judge.add(f"real scenes, {name}", "", real_features(network, FLOOR_SEED, others, size), size)
        judge.add(name, schedule, generated(fp32, schedule, others), size)
    _show(judge.rows)
    return {
        "weights": digests(model),
        "network": network.identity,
        "classifier_held_out_accuracy": known,
        "classifier_held_out_scenes": HELD_OUT,
        "tokenizer": {name: value for name, value in vars(reconstruction).items() if name != "pixels"},
        "options": {**asdict(options), "rule": "ramp", "greedy_scales": "none", "seed": SEED},
        "rows": [row.to_json() for row in judge.rows],
    }


def _show(rows: list[Row]) -> None:
    table = Table("images", "pixels", "recognised", "Fréchet distance", "95 %", "minus fp32", "schedule")
    for row in rows:
        against = "" if row.against_fp32 is None else _describe(row.against_fp32)
        table.add_row(
            row.name,
            f"{row.height}x{row.width}",
            f"{row.accuracy:.1%}",
            f"{row.frechet:.2f}",
            "{:.2f} to {:.2f}".format(*row.frechet_interval),
            against,
            row.schedule,
        )
    console.print(table)


def _describe(against: Against) -> str:
    low, high = against.interval
    return f"{against.difference:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--images", type=int, default=2000, help="Images of each row. Default: 2000.")
    parser.add_argument(
        "--others", type=int, default=240, help="Images of each row with other steps or another size. Default: 240."
    )
    arguments = parser.parse_args()
    if not FEWEST_IMAGES <= arguments.others <= arguments.images:
        limits = f"from {FEWEST_IMAGES} to --images ({arguments.images})"
        parser.error(f"--others is {arguments.others}, but it must be {limits}.")
    options = prepare(arguments)
    with FeatureNetwork.open(network_file(arguments.work, say=console.print)) as network:
        counts = arguments.images, arguments.others
        result = evaluate(arguments.model, arguments.work, network, *counts, options)
    write_result(arguments.json, result)


if __name__ == "__main__":
    main()
