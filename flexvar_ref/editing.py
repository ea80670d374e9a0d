"""What an edit keeps of an image: its tokens at every scale, and which of them a mask lets stay.

Source: FlexVAR, section 4: in- and outpainting put the image's own tokens back at every scale, refinement forces the
first scales. The rules for masks are this project's: the paper has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .generation import Given
from .scales import Scales, ScalesLike, as_schedule
from .tokenizer import Tokenizer


def refine(tokenizer: Tokenizer, image_BCHW: Tensor, scales: ScalesLike, forced: int) -> Given:
    """Keep the first `forced` scales of an image (B, 3, H, W) in −1…1 whole, and nothing of the others."""
    scales = as_schedule(scales)
    if not 0 <= forced < len(scales):
        raise ValueError(f"got {forced} forced scales; expected 0 to {len(scales) - 1}; fix: leave one to generate")
    with torch.inference_mode():
        tokens = tokenizer.quantize(tokenizer.encode(image_BCHW), scales)
    keep = [torch.full_like(scale, i < forced, dtype=torch.bool) for i, scale in enumerate(tokens)]
    return Given(tuple(tokens), tuple(keep))


def inpaint(tokenizer: Tokenizer, image_BCHW: Tensor, mask_BHW: Tensor, scales: ScalesLike) -> Given:
    """Keep an image (B, 3, H, W) in −1…1 where the mask (B, H, W) bool is false. See `keep_maps`, `masked_tokens`."""
    scales = as_schedule(scales)
    with torch.inference_mode():
        tokens = masked_tokens(tokenizer, tokenizer.encode(image_BCHW), mask_BHW, scales)
    return Given(tuple(tokens), tuple(keep_maps(mask_BHW, scales)))


def keep_maps(mask_BHW: Tensor, scales: Scales) -> list[Tensor]:
    """Which tokens stay, (B, h, w) bool a scale: those of which at most half is masked; of the last scale, the image
    itself, those that are not masked at all."""
    mask = mask_BHW[:, None].double()
    shares = [F.adaptive_avg_pool2d(mask, size)[:, 0] for size in scales]
    return [share <= (0.5 if i < len(scales) - 1 else 0.0) for i, share in enumerate(shares)]


def masked_tokens(tokenizer: Tokenizer, latent_BDhw: Tensor, mask_BHW: Tensor, scales: Scales) -> list[Tensor]:
    """Tokens (B, h, w) of every scale from what the mask keeps: a token that stands for masked and kept parts of the
    image is the nearest code to the mean of the kept ones, so that coarse scales do not tell what is to go."""
    h, w = latent_BDhw.shape[2:]
    kept = 1 - F.adaptive_avg_pool2d(mask_BHW[:, None].double(), (h, w)).float()
    tokens = []
    for size in scales:
        weight = F.interpolate(kept, size=size, mode="area")
        mean = F.interpolate(latent_BDhw * kept, size=size, mode="area") / weight
        plain = F.interpolate(latent_BDhw, size=size, mode="area")
        tokens.append(tokenizer.nearest(torch.where(weight > 0, mean, plain)))
    return tokens
