"""The tokens that an edit keeps of an image, at every scale.

Source: FlexVAR, section 4. In- and outpainting put the image's own tokens back at every scale; refinement forces the
first scales. The paper gives no rules for masks; the rules here are this project's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InvalidInput
from .generation import Given
from .scales import Scales, ScalesLike, as_schedule
from .tokenizer import Tokenizer


def refine(tokenizer: Tokenizer, image_BCHW: Tensor, scales: ScalesLike, forced: int) -> Given:
    """Keep the first `forced` scales of images (B, 3, H, W) in −1…1, and nothing of the other scales.

    Raises InvalidInput unless at least one scale is left to generate.
    """
    scales = as_schedule(scales)
    if not 0 <= forced < len(scales):
        raise InvalidInput(
            f"forced is {forced}, but for this schedule it must be from 0 to {len(scales) - 1}.",
            expected=f"0 to {len(scales) - 1}",
            fix="Leave at least one scale to generate.",
        )
    with torch.inference_mode():
        tokens = tokenizer.quantize(tokenizer.encode(image_BCHW), scales)
    keep = [torch.full_like(scale, i < forced, dtype=torch.bool) for i, scale in enumerate(tokens)]
    return Given(tuple(tokens), tuple(keep))


def inpaint(tokenizer: Tokenizer, image_BCHW: Tensor, mask_BHW: Tensor, scales: ScalesLike) -> Given:
    """Keep images (B, 3, H, W) in −1…1 where the mask (B, H, W) bool is false. See `keep_maps` and `masked_tokens`."""
    scales = as_schedule(scales)
    with torch.inference_mode():
        tokens = masked_tokens(tokenizer, tokenizer.encode(image_BCHW), mask_BHW, scales)
    return Given(tuple(tokens), tuple(keep_maps(mask_BHW, scales)))


def keep_maps(mask_BHW: Tensor, scales: Scales) -> list[Tensor]:
    """Maps (B, h, w) bool for every scale, true where the token is kept.

    A token is kept if at most half of its area is masked. At the last scale it is kept only if none of it is masked.
    """
    mask = mask_BHW[:, None].double()
    shares = [F.adaptive_avg_pool2d(mask, size)[:, 0] for size in scales]
    return [share <= (0.5 if i < len(scales) - 1 else 0.0) for i, share in enumerate(shares)]


def masked_tokens(tokenizer: Tokenizer, latent_BDhw: Tensor, mask_BHW: Tensor, scales: Scales) -> list[Tensor]:
    """Tokens (B, h, w) of every scale, computed from the kept parts of the image.

    A token that covers masked and kept parts is the code nearest to the mean of the kept parts. So coarse scales do not
    reveal what is masked.
    """
    h, w = latent_BDhw.shape[2:]
    kept = 1 - F.adaptive_avg_pool2d(mask_BHW[:, None].double(), (h, w)).float()
    tokens = []
    for size in scales:
        weight = F.interpolate(kept, size=size, mode="area")
        mean = F.interpolate(latent_BDhw * kept, size=size, mode="area") / weight
        plain = F.interpolate(latent_BDhw, size=size, mode="area")
        tokens.append(tokenizer.nearest(torch.where(weight > 0, mean, plain)))
    return tokens
