"""The VQ tokenizer: convolutional encoder, multi-scale quantizer, convolutional decoder.

Shapes: image (B, 3, H, W) in −1…1; latent (B, D, h, w) with h = H / downsampling; tokens (B, h, w).
Parameter names are those of the published checkpoint. Source: FlexVAR, section 3.1, after VQGAN and LlamaGen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TokenizerConfig
from .errors import InvalidInput
from .scales import ScalesLike, as_scales

NORM_EPS = 1e-6


def _norm(config: TokenizerConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.groups, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, added to the input."""

    def __init__(self, config: TokenizerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = _norm(config, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Attention with one head over all positions, added to the input."""

    def __init__(self, config: TokenizerConfig, channels: int) -> None:
        super().__init__()
        self.norm = _norm(config, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        normed = self.norm(x)
        q, k, v = (layer(normed).view(B, 1, C, H * W).transpose(2, 3) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(2, 3).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halves the sides with a 3×3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides: nearest neighbour, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a resize. At the coarsest level attention follows each block."""

    def __init__(self, config: TokenizerConfig, inputs: int, outputs: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [inputs] + [outputs] * (blocks - 1)
        self.res = nn.ModuleList(ResidualBlock(config, width, outputs) for width in widths)
        self.attn = nn.ModuleList(AttentionBlock(config, outputs) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn) > 0:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def _middle(config: TokenizerConfig, channels: int) -> nn.ModuleList:
    residual = [ResidualBlock(config, channels, channels) for _ in range(2)]
    return nn.ModuleList([residual[0], AttentionBlock(config, channels), residual[1]])


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, latent_channels, h, w)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        levels = config.level_channels
        self.conv_in = nn.Conv2d(3, levels[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip((levels[0], *levels), levels, strict=False)):
            last = i == len(levels) - 1
            level = Level(config, inputs, outputs, config.encoder_blocks, attention=last)
            if not last:
                level.downsample = Downsample(outputs)
            self.conv_blocks.append(level)
        self.mid = _middle(config, levels[-1])
        self.norm_out = _norm(config, levels[-1])
        self.conv_out = nn.Conv2d(levels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.conv_blocks, *self.mid):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features (B, latent_channels, h, w) to an image (B, 3, H, W), not clamped."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        levels = config.level_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, levels[0], 3, padding=1)
        self.mid = _middle(config, levels[0])
        self.conv_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip((levels[0], *levels), levels, strict=False)):
            level = Level(config, inputs, outputs, config.decoder_blocks, attention=i == 0)
            if i < len(levels) - 1:
                level.upsample = Upsample(outputs)
            self.conv_blocks.append(level)
        self.norm_out = _norm(config, levels[-1])
        self.conv_out = nn.Conv2d(levels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid, *self.conv_blocks):
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook. Its rows are stored as they are and l2-normalised on every use."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.vocabulary, 1 / config.vocabulary)

    @property
    def codebook_VD(self) -> Tensor:
        """The l2-normalised codebook (V, D)."""
        return F.normalize(self.embedding.weight, dim=-1)


class Tokenizer(nn.Module):
    """Images to tokens at every scale, and tokens of any (h, w) back to an image."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    @property
    def codebook_VD(self) -> Tensor:
        """The l2-normalised codebook (V, D)."""
        return self.quantizer.codebook_VD

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in −1…1 to continuous latents (B, D, h, w), neither resized nor normalised.

        Raises InvalidInput for another shape, or a side that is not a multiple of the downsampling.
        """
        factor = self.config.downsampling
        sides = image_BCHW.shape[2:]
        if image_BCHW.ndim != 4 or image_BCHW.shape[1] != 3 or any(s % factor or s < factor for s in sides):
            raise InvalidInput(
                f"The image has the shape {tuple(image_BCHW.shape)}, but it must be (B, 3, H, W) with H and W in "
                f"multiples of {factor}.",
                expected=f"(B, 3, H, W) with sides in multiples of {factor}",
                fix="Resize or pad the image.",
            )
        return self.quant_conv(self.encoder(image_BCHW))

    def quantize(self, latent_BDhw: Tensor, scales: ScalesLike) -> list[Tensor]:
        """Tokens (B, h, w) at every scale, of latents (B, D, h, w) as `encode` returns them.

        The latents are resized (area), then l2-normalised, then replaced by the nearest code. Raises InvalidInput.
        """
        if latent_BDhw.ndim != 4 or latent_BDhw.shape[1] != self.config.code_dim:
            expected = f"(B, {self.config.code_dim}, h, w)"
            raise InvalidInput(
                f"The latent has the shape {tuple(latent_BDhw.shape)}, but it must be {expected}.",
                expected=expected,
                fix="Pass the latent that encode returns.",
            )
        return [self.nearest(F.interpolate(latent_BDhw, size=size, mode="area")) for size in as_scales(scales)]

    def nearest(self, latent_BDhw: Tensor) -> Tensor:
        """Tokens (B, h, w) of latents (B, D, h, w): the code nearest to each latent vector, both l2-normalised."""
        z = F.normalize(latent_BDhw, dim=1)
        return torch.einsum("bdhw,vd->bhwv", z, self.codebook_VD).argmax(-1)

    def decode(self, tokens_Bhw: Tensor) -> Tensor:
        """Tokens (B, h, w) of one scale to images (B, 3, H, W), nominally in −1…1, not clamped. Raises InvalidInput."""
        if tokens_Bhw.ndim != 3:
            raise InvalidInput(
                f"tokens has the shape {tuple(tokens_Bhw.shape)}, but it must be (B, h, w).",
                expected="(B, h, w)",
                fix="Reshape the tokens to one map for each image.",
            )
        return self.decode_codes(F.embedding(tokens_Bhw.long(), self.codebook_VD))

    def decode_codes(self, codes_BhwD: Tensor) -> Tensor:
        """l2-normalised codes (B, h, w, D) to images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(codes_BhwD.permute(0, 3, 1, 2)))
