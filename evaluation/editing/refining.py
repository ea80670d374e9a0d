"""How good small pictures are after they were refined, compared with bicubic interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..judging import distance_to, features_of, recognised_share
from ..network.features import FeatureNetwork
from ..pictures import Pixels
from ..reference import Reference
from .editor import Editor, LabelledPictures
from .pixel_measures import psnr, resized


@dataclass(frozen=True, kw_only=True)
class Enlarged:
    """Pictures that were enlarged. frechet: distance to the reference. recognised: the share that is recognised.
    psnr: of the pictures made small again against the small ones, in dB."""

    frechet: float
    recognised: float
    psnr: float
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Refining:
    """Small pictures, enlarged by bicubic interpolation and refined with each strength. None is the default strength.

    original: the pictures that were made small.
    """

    original: Enlarged
    bicubic: Enlarged
    by_strength: dict[float | None, Enlarged]


def refining(
    editor: Editor,
    network: FeatureNetwork,
    pictures: LabelledPictures,
    reference: Reference,
    strengths: Sequence[float],
    factor: int = 4,
) -> Refining:
    """Make every picture smaller by `factor`, and refine it to its size again.

    reference: of as many real pictures as there are pictures, because the distance depends on the number.
    """
    pixels, labels = pictures.pixels, pictures.labels
    _, height, width, _ = pixels.shape
    small_size = height // factor, width // factor
    small = resized(pixels, small_size, Image.Resampling.BOX)

    def judged(images: Pixels) -> Enlarged:
        features = features_of(network, images, labels)
        return Enlarged(
            frechet=distance_to(reference, features),
            recognised=recognised_share(features, network.head),
            psnr=psnr(resized(images, small_size, Image.Resampling.BOX), small),
            pixels=images,
        )

    def refined(strength: float | None) -> Enlarged:
        return judged(editor.edited(small, labels, "refine", size=(height, width), strength=strength))

    return Refining(
        original=judged(pixels),
        bicubic=judged(resized(small, (height, width), Image.Resampling.BICUBIC)),
        by_strength={strength: refined(strength) for strength in (None, *strengths)},
    )
