"""How good pictures of other sizes are: expanded ones, and ones that are generated anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexvar_runtime import ScaleSchedule

from ..judging import distance_to, features_of, recognised_share
from ..network.features import FeatureNetwork
from ..pictures import Pixels
from ..reference import Reference
from .editor import Editor, LabelledPictures


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """Pictures that were expanded. recognised: the share that is recognised."""

    recognised: float
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Images that were generated. recognised: the share that is recognised. frechet: distance to the reference."""

    recognised: float
    frechet: float
    pixels: Pixels


def expanding(editor: Editor, network: FeatureNetwork, pictures: LabelledPictures, size: tuple[int, int]) -> Expanded:
    """Expand every picture to `size` (height, width) in pixels. The picture itself is pasted."""
    pixels = editor.pasted(pictures.pixels, pictures.labels, "expand", size=size)
    features = features_of(network, pixels, pictures.labels)
    return Expanded(recognised=recognised_share(features, network.head), pixels=pixels)


def generating(
    editor: Editor, network: FeatureNetwork, schedule: ScaleSchedule, count: int, reference: Reference
) -> Generated:
    """Generate images with a schedule. Image i has class i mod the number of classes.

    reference: of `count` real pictures of that size, because the distance depends on the number.
    """
    pixels = editor.generated(schedule, count)
    labels = np.arange(count, dtype=np.int64) % editor.pipe.model.classes
    features = features_of(network, pixels, labels)
    share = recognised_share(features, network.head)
    return Generated(recognised=share, frechet=distance_to(reference, features), pixels=pixels)
