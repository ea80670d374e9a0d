"""What the two evaluations of the demo model have in common: options, the work folder, and real scenes to compare with.

In the work folder are the feature network, the bundles and the runs. A later evaluation uses them again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scene_classifier import REFERENCE_SEED, real

from flexvar_evaluation.features import LoadedFeatures
from flexvar_evaluation.judging import features_of
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.reference import Reference, make_reference
from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_runtime.files.atomic import atomic_write, require_parent
from flexvar_runtime.model.schedule import PUBLISHED

BATCH, SEED = 20, 2026
"""Images that are generated at once, and the seed of all images."""
DEFAULT = ScaleSchedule.parse(PUBLISHED["10"])


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


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both evaluations."""
    parser.add_argument(
        "--model", type=Path, required=True, help="Folder with transformer.safetensors and vae.safetensors."
    )
    parser.add_argument("--work", type=Path, required=True, help="Folder for the network, the bundles and the runs.")
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


def real_features(network: FeatureNetwork, seed: int, count: int, size: tuple[int, int]) -> LoadedFeatures:
    """The features of real scenes of `size` (height, width), with their labels."""
    return features_of(network, *real(seed, count, size))


def real_reference(network: FeatureNetwork, count: int, size: tuple[int, int]) -> Reference:
    """Real scenes of `size` (height, width) to compare images with.

    Compare as many images, because a Fréchet distance depends on both numbers.
    """
    pixels, labels = real(REFERENCE_SEED, count, size)
    return make_reference(
        features_of(network, pixels, labels),
        (None, None),
        network.head,
        source=f"scenes of seed {REFERENCE_SEED}",
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
        size=size,
        network_name=network.name,
    )
