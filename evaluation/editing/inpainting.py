"""How well a hole in a picture is filled, and what stays around it."""

from __future__ import annotations

from dataclasses import dataclass

from ..judging import Labels, features_of, recognised_share
from ..network.features import FeatureNetwork
from ..pictures import Pixels
from .editor import Editor, LabelledPictures
from .pixel_measures import beyond, centred_hole, psnr, seam

GREY = 128
"""The value of a hole that is not filled."""


@dataclass(frozen=True, kw_only=True)
class Filled:
    """Pictures whose hole was filled.

    recognised: the share that is recognised. seam: the mean step between neighbouring pixels across the edge of the
    hole, divided by that of the pictures. The same after pasting. psnr_outside: without pasting, in dB, beyond the
    feather, against the tokenizer's reconstruction. changed: how many values beyond the feather differ from those of
    the pictures, although they were pasted. pixels: of the pasted results.
    """

    recognised: float
    recognised_pasted: float
    seam: float
    seam_pasted: float
    psnr_outside: float
    changed: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """A hole that was filled with the class of each picture, and without a class.

    Recognised shares without an edit: of the pictures, of their reconstruction, of the pictures with a grey hole.
    holes: pixels of the last.
    """

    recognised: float
    recognised_reconstructed: float
    recognised_with_hole: float
    with_class: Filled
    without_class: Filled
    holes: Pixels


def inpainting(editor: Editor, network: FeatureNetwork, pictures: LabelledPictures) -> Inpainting:
    """Fill a centred hole of half the height and half the width in every picture."""
    pixels, labels = pictures.pixels, pictures.labels
    _, height, width, _ = pixels.shape
    mask = centred_hole(height, width)
    outside, own_seam, rebuilt = beyond(mask, editor.options.feather), seam(pixels, mask), editor.reconstructed(pixels)
    holes = pixels.copy()
    holes[:, mask] = GREY

    def share(images: Pixels) -> float:
        return recognised_share(features_of(network, images, labels), network.head)

    def filled(classes: Labels | None) -> Filled:
        plain = editor.edited(pixels, classes, "inpaint", mask=mask, size=(height, width))
        pasted = editor.pasted(pixels, classes, "inpaint", mask=mask, size=(height, width))
        return Filled(
            recognised=share(plain),
            recognised_pasted=share(pasted),
            seam=seam(plain, mask) / own_seam,
            seam_pasted=seam(pasted, mask) / own_seam,
            psnr_outside=psnr(plain[:, outside], rebuilt[:, outside]),
            changed=int((pasted[:, outside] != pixels[:, outside]).sum()),
            pixels=pasted,
        )

    return Inpainting(
        recognised=share(pixels),
        recognised_reconstructed=share(rebuilt),
        recognised_with_hole=share(holes),
        with_class=filled(labels),
        without_class=filled(None),
        holes=holes,
    )
