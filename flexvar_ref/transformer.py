"""The FlexVAR transformer: AdaLN blocks over a sequence of scales. Each scale is a whole token map.

Shapes: B images, N sequences (2B with guidance), L tokens, C width, V vocabulary, D code dimension.
Parameter names are those of the published checkpoints. Source: FlexVAR, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TransformerConfig
from .errors import InvalidInput
from .scales import Scales, ScalesLike, as_schedule

NORM_EPS = 1e-6
LOGIT_SCALE_LIMIT = math.log(100)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the P tokens so far: (N, heads, P, head_size) for each block."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Number of cached tokens, P."""
        return self.keys[0].shape[2]


def resize_codes(codes_BhwD: Tensor, size: tuple[int, int]) -> Tensor:
    """Codes (B, h, w, D) resized to (B, *size, D): bicubic with a = −0.75, half-pixel centres, no antialiasing."""
    resized = F.interpolate(codes_BhwD.permute(0, 3, 1, 2), size=size, mode="bicubic")
    return resized.permute(0, 2, 3, 1)


def block_causal_mask(scales: Scales, device: torch.device | None = None) -> Tensor:
    """(L, L) bool, true where row attends to column: a token attends to its own scale and to all earlier ones."""
    index = torch.cat([torch.full((h * w,), i, device=device) for i, (h, w) in enumerate(scales)])
    return index[:, None] >= index[None, :]


class SelfAttention(nn.Module):
    """Multi-head attention with l2-normalised q and k and a learned temperature per head."""

    zero_k_bias: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), 4.0).log())
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_NLC: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output (N, L, C), and the keys and the values (N, heads, P + L, head_size) of past and new tokens."""
        N, L, C = x_NLC.shape
        bias = torch.cat((self.q_bias, self.zero_k_bias, self.v_bias))
        qkv = F.linear(x_NLC, self.mat_qkv.weight, bias).view(N, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(LOGIT_SCALE_LIMIT).exp()
        k = F.normalize(k, dim=-1)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(N, L, C)), k, v


class FeedForward(nn.Module):
    """The MLP of a block, with the tanh form of GELU."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.fc2 = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class AdaLN(nn.Sequential):
    """Turns the class condition (N, C) into `parts` modulations of width C, (N, parts · C)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))

    @property
    def linear(self) -> nn.Linear:
        return cast("nn.Linear", self[1])


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by modulations of the class (AdaLN)."""

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        super().__init__()
        self.width, self.drop_path = config.width, drop_path
        self.attn = SelfAttention(config)
        self.ffn = FeedForward(config)
        self.ada_lin = AdaLN(config.width, 6)

    def forward(
        self, x: Tensor, cond_NC: Tensor, past: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        modulation = self.ada_lin(cond_NC).view(-1, 1, 6, self.width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        out, k, v = self.attn(self._norm(x) * (1 + scale1) + shift1, past, mask)
        x = x + self._drop(out * gamma1)
        x = x + self._drop(self.ffn(self._norm(x) * (1 + scale2) + shift2) * gamma2)
        return x, k, v

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=NORM_EPS)

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class Blocks(nn.ModuleList):
    """The transformer blocks, in order."""

    def __iter__(self) -> Iterator[Block]:
        return cast("Iterator[Block]", super().__iter__())


class HeadModulation(nn.Module):
    """Normalisation before the head, scaled and shifted by modulations of the class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.ada_lin = AdaLN(config.width, 2)

    def forward(self, x_NLC: Tensor, cond_NC: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond_NC).view(-1, 1, 2, self.width).unbind(2)
        return F.layer_norm(x_NLC, (self.width,), eps=NORM_EPS) * (1 + scale) + shift


class FlexVAR(nn.Module):
    """The transformer.

    config: its sizes. codebook_VD: the tokenizer's l2-normalised codebook, which embeds the input tokens.
    Raises InvalidInput if the codebook has another shape.
    """

    codebook_VD: Tensor

    def __init__(self, config: TransformerConfig, codebook_VD: Tensor) -> None:
        super().__init__()
        if codebook_VD.shape != (config.vocabulary, config.code_dim):
            expected = f"({config.vocabulary}, {config.code_dim})"
            raise InvalidInput(
                f"The codebook has the shape {tuple(codebook_VD.shape)}, but this transformer needs {expected}.",
                expected=expected,
                fix="Use the tokenizer that this transformer was trained with.",
            )
        self.config = config
        C, side = config.width, config.position_side
        self.register_buffer("codebook_VD", codebook_VD.detach().clone(), persistent=False)
        self.pos_start = nn.Parameter(torch.empty(1, 1, C))
        self.pos_1LC = nn.Parameter(torch.empty(1, C, side, side))
        self.word_embed = nn.Linear(config.code_dim, C)
        self.class_emb = nn.Embedding(config.classes + 1, C)
        last = max(config.depth - 1, 1)
        self.blocks = Blocks(Block(config, config.drop_path * i / last) for i in range(config.depth))
        self.head_nm = HeadModulation(config)
        self.head = nn.Linear(C, config.vocabulary)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published: truncated normal of std sqrt(1/(3C)), small head and AdaLN, scaled residuals."""
        std = math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_nm.ada_lin.linear.weight.mul_(0.5)
            for block in self.blocks:
                block.ada_lin.linear.weight[2 * self.config.width :].mul_(0.5)
                block.ada_lin.linear.weight[: 2 * self.config.width].mul_(1e-5)
                block.attn.proj.weight.div_(math.sqrt(2 * self.config.depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * self.config.depth))

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings (h·w, C) of a token map: the table resized by adaptive average pooling."""
        return F.interpolate(self.pos_1LC, size=(h, w), mode="area")[0].flatten(1).T

    def condition(self, labels_B: Tensor) -> Tensor:
        """The class embedding (B, C), which modulates every block and the head."""
        return self.class_emb(labels_B)

    def first_input(self, labels_B: Tensor) -> Tensor:
        """Input of the first scale (B, 1, C)."""
        return self.class_emb(labels_B)[:, None] + self.pos_start + self.positions(1, 1)

    def next_codes(self, tokens: Tensor, size: tuple[int, int], next_size: tuple[int, int]) -> Tensor:
        """Codes (B, h'·w', D) for the scale `next_size`, from the tokens (B, h, w) or (B, h·w) of the scale `size`."""
        codes = F.embedding(tokens.reshape(-1, *size), self.codebook_VD)
        return resize_codes(codes, next_size).flatten(1, 2)

    def next_input(self, tokens: Tensor, size: tuple[int, int], next_size: tuple[int, int]) -> Tensor:
        """Input (B, h'·w', C) of the scale `next_size`: `next_codes` embedded, plus the positions."""
        return self.word_embed(self.next_codes(tokens, size, next_size)) + self.positions(*next_size)

    def step(self, x_NLC: Tensor, cond_NC: Tensor, cache: KVCache | None) -> tuple[Tensor, KVCache]:
        """Run one scale after the cached ones. Returns hidden states (N, L, C) and the cache with this scale added."""
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            past = None if cache is None else (cache.keys[i], cache.values[i])
            x_NLC, k, v = block(x_NLC, cond_NC, past)
            keys.append(k)
            values.append(v)
        return x_NLC, KVCache(tuple(keys), tuple(values))

    def logits(self, x_NLC: Tensor, cond_NC: Tensor) -> Tensor:
        """Hidden states (N, L, C) to logits (N, L, V)."""
        return self.head(self.head_nm(x_NLC, cond_NC))

    def forward(
        self, labels_B: Tensor | Sequence[int], tokens_per_scale: Sequence[Tensor], scales: ScalesLike
    ) -> Tensor:
        """Teacher-forced logits (B, L, V) of all scales, without guidance, under the block-causal mask.

        tokens_per_scale: true tokens (B, h, w) or (B, h·w) of every scale. The last scale may be left out, because
        nothing follows it. In training mode a label becomes "no class" with probability `label_dropout`.
        Raises InvalidInput.
        """
        scales = as_schedule(scales)
        labels_B = torch.as_tensor(labels_B, dtype=torch.long, device=self.head.weight.device)
        if len(tokens_per_scale) not in (len(scales), len(scales) - 1):
            raise InvalidInput(
                f"tokens_per_scale holds {len(tokens_per_scale)} scales, but the schedule has {len(scales)}.",
                expected=f"{len(scales)} scales",
                fix="Pass one token map for each scale.",
            )
        for tokens, (h, w) in zip(tokens_per_scale, scales, strict=False):
            B = len(labels_B)
            if tokens.shape not in ((B, h, w), (B, h * w)):
                raise InvalidInput(
                    f"The tokens of scale {h}x{w} have the shape {tuple(tokens.shape)}, but it must be {(B, h, w)}.",
                    expected=str((B, h, w)),
                    fix="Pass one token for each label and position.",
                )
        if self.training and self.config.label_dropout > 0:
            dropped = torch.rand(labels_B.shape, device=labels_B.device) < self.config.label_dropout
            labels_B = labels_B.masked_fill(dropped, self.config.null_class)
        x, cond = self._inputs(labels_B, tokens_per_scale, scales), self.condition(labels_B)
        mask = block_causal_mask(scales, x.device)
        for block in self.blocks:
            x = block(x, cond, mask=mask)[0]
        return self.logits(x, cond)

    def prefill(self, labels_N: Tensor, tokens_per_scale: Sequence[Tensor], scales: ScalesLike) -> KVCache:
        """The cache of given scales, computed in one pass under the block-causal mask.

        It equals the cache after one `step` for each scale. tokens_per_scale: tokens (N, h, w) of every scale. The last
        scale may be left out, because nothing follows it.
        """
        scales = as_schedule(scales)
        x, cond = self._inputs(labels_N, tokens_per_scale, scales), self.condition(labels_N)
        mask = block_causal_mask(scales, x.device)
        keys, values = [], []
        for block in self.blocks:
            x, k, v = block(x, cond, mask=mask)
            keys.append(k)
            values.append(v)
        return KVCache(tuple(keys), tuple(values))

    def _inputs(self, labels_B: Tensor, tokens_per_scale: Sequence[Tensor], scales: Scales) -> Tensor:
        inputs = [self.first_input(labels_B)]
        for tokens, size, next_size in zip(tokens_per_scale, scales, scales[1:], strict=False):
            inputs.append(self.next_input(tokens.long(), size, next_size))
        return torch.cat(inputs, dim=1)
