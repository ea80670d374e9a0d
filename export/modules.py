"""The graphs of a bundle as torch modules, with the weights of the reference laid out and typed for deployment.

Shapes: N sequences, B images, L new and P past tokens, H heads of size S, C width, D code dimension, V vocabulary, M
labels.

Types are part of the graph. Matrix products, convolutions and attention run in `dtype`. Normalisations, q/k
normalisation, guidance, logits, and the residual streams of the transformer and the encoder stay float32. The residual
stream of the decoder is in `dtype`: it passes its gate, and float32 maps of full size would double its memory traffic.
Parts of blocks that are too sensitive to rounding can stay float32: see `block_parts` and `sensitivity`. With int8 only
the linear layers of the blocks compute on integers (`int8`). Everything else is float32.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.transformer import LOGIT_SCALE_LIMIT, NORM_EPS, Block
from flexvar_runtime.bundle.manifest import PLAIN
from flexvar_runtime.model.signatures import CONDITION, ENCODE, HEAD_MODULATION, MODULATION, PREFILL, STEP

from .int8 import LOW, MIDDLE, Int8Dense
from .upsampling import replace_upsampling

L2_EPS = 1e-12
ATTENTION, MLP = "attention", "mlp"
Kept = Collection[str]  # the names in `block_parts` that stay float32


def block_parts(depth: int) -> tuple[str, ...]:
    """The names of the parts that a step can keep in float32: `blocks.I.attention` and `blocks.I.mlp` of every block.

    The attention includes its projections. Keys and values are cached in the precision of the step in any case.
    """
    return tuple(f"blocks.{i}.{part}" for i in range(depth) for part in (ATTENTION, MLP))


def _matrix(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight of a linear layer as (inputs, outputs), so that the graph needs no transpose."""
    return layer.weight.detach().T.to(dtype).contiguous()


def _vector(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).contiguous()


class Dense(nn.Module):
    """x (…, I) · weight (I, O) + bias (O) in `dtype`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight_IO: Tensor, bias_O: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_IO)
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight + self.bias


def _dense(weight_IO: Tensor, bias_O: Tensor, dtype: torch.dtype, zero: int = MIDDLE) -> Dense | Int8Dense:
    if dtype == torch.int8:
        return Int8Dense(weight_IO, bias_O, zero)
    return Dense(weight_IO.to(dtype).contiguous(), _vector(bias_O, dtype))


def linear(layer: nn.Linear, dtype: torch.dtype, zero: int = MIDDLE) -> Dense | Int8Dense:
    """A linear layer of the reference with its product in `dtype`. zero: see `Int8Dense`, for torch.int8 only."""
    return _dense(_matrix(layer, torch.float32), layer.bias, dtype, zero)


def _floating(dtype: torch.dtype) -> torch.dtype:
    """The type of everything around products in `dtype`: float32 for int8, else `dtype`."""
    return torch.float32 if dtype == torch.int8 else dtype


class Modulation(nn.Module):
    """h (…, C) · weight (C, O) in `dtype`, + offset (O) in float32.

    h is the difference of a class from the mean of all classes: W·a + b = W·(a − mean) + (W·mean + b), exactly. The
    common part can be a dozen times larger than the differences. It is never rounded to half precision.
    """

    weight: Tensor
    offset: Tensor

    def __init__(self, layer: nn.Linear, mean_C: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        common = layer.weight.detach().double() @ mean_C.double() + layer.bias.detach().double()
        self.register_buffer("weight", _matrix(layer, dtype))
        self.register_buffer("offset", _vector(common, torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        return (h.to(self.weight.dtype) @ self.weight).float() + self.offset


class Condition(nn.Module):
    """labels M int32 -> gamma1, gamma2, scale1, scale2, shift1, shift2 of every block, head_scale, head_shift and
    first_input, each (M, 1, C) float32.

    They are split here, once per class, so that `Step` needs no slicing at every scale.
    """

    class_embedding: Tensor
    mean: Tensor
    start: Tensor

    def __init__(self, model: FlexVAR, dtype: torch.dtype) -> None:
        super().__init__()
        mean_C = F.silu(model.class_emb.weight.detach()).mean(0)
        self.register_buffer("class_embedding", _vector(model.class_emb.weight, torch.float32))
        self.register_buffer("start", _vector(model.pos_start + model.positions(1, 1), torch.float32))
        self.register_buffer("mean", _vector(mean_C, torch.float32))
        self.blocks = nn.ModuleList(Modulation(block.ada_lin.linear, mean_C, dtype) for block in model.blocks)
        self.head = Modulation(model.head_nm.ada_lin.linear, mean_C, dtype)

    def forward(self, labels: Tensor) -> tuple[Tensor, ...]:
        embedding = F.embedding(labels, self.class_embedding)[:, None]
        hidden = F.silu(embedding) - self.mean
        parts = zip(*(block(hidden).chunk(len(MODULATION), -1) for block in self.blocks), strict=True)
        blocks = (value for part in parts for value in part)
        return *blocks, *self.head(hidden).chunk(len(HEAD_MODULATION), -1), embedding + self.start


class StepBlock(nn.Module):
    """One transformer block over new tokens. Past keys and values are token-major.

    dtype: the type of keys and values. attention, mlp: the types that these parts compute in. With torch.int8 only the
    linear layers are int8. Keys, values and attention are float32 then.
    """

    temperature: Tensor

    def __init__(self, block: Block, dtype: torch.dtype, attention: torch.dtype, mlp: torch.dtype) -> None:
        super().__init__()
        attn = block.attn
        self.width, self.heads = block.width, attn.heads
        self.dtype, self.attention_dtype = _floating(dtype), _floating(attention)
        self.head_size = self.width // self.heads
        weights = _matrix(attn.mat_qkv, torch.float32).chunk(3, dim=1)
        biases = (attn.q_bias, attn.zero_k_bias, attn.v_bias)
        self.q, self.k, self.v = (_dense(w, b, attention) for w, b in zip(weights, biases, strict=True))
        self.proj = linear(attn.proj, attention)
        self.fc1, self.fc2 = linear(block.ffn.fc1, mlp), linear(block.ffn.fc2, mlp, LOW)
        temperature = attn.scale_mul_1H11.detach().clamp_max(LOGIT_SCALE_LIMIT).exp()
        self.register_buffer("temperature", _vector(temperature.view(attn.heads, 1), torch.float32))

    def forward(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, L, C), modulation 6 times (N, 1, C), past keys and values (P, N, H, S) -> x (N, L, C), new keys and
        new values (L, N, H, S). mask (L, L): the tokens that each token attends to, where there is no past."""
        N, L, _ = x.shape
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        q, k, v = self.project(x, scale1, shift1)
        keys, values = (k, v) if past is None else (torch.cat((past[0], k)), torch.cat((past[1], v)))
        keys, values = (cache.to(self.attention_dtype).permute(1, 2, 0, 3) for cache in (keys, values))
        out = self._attend(q, keys, values, mask)
        x = x + self.proj(out.transpose(1, 2).reshape(N, L, self.width)).float() * gamma1
        hidden = F.gelu(self.fc1(self._norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + self.fc2(hidden).float() * gamma2, k, v

    def project(self, x: Tensor, scale1: Tensor, shift1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, L, C) -> queries (N, H, L, S), new keys and new values (L, N, H, S), typed as they are cached."""
        N, L, _ = x.shape
        hidden = (self._norm(x) * (1 + scale1) + shift1).to(self.attention_dtype)
        q, k, v = (dense(hidden).view(N, L, self.heads, self.head_size) for dense in (self.q, self.k, self.v))
        q = (self._unit(q) * self.temperature).to(self.attention_dtype).transpose(1, 2)
        return q, self._unit(k).to(self.dtype).transpose(0, 1), v.to(self.dtype).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.attention_dtype == self.dtype:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        scores = q @ k.mT  # no fused attention: TensorRT-RTX 1.7 crashes on float32 attention over half-precision keys
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), eps=NORM_EPS)

    @staticmethod
    def _unit(x: Tensor) -> Tensor:
        x = x.float()
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(L2_EPS)


def _blocks(model: FlexVAR, dtype: torch.dtype, kept: Kept) -> nn.ModuleList:
    def of(i: int, part: str) -> torch.dtype:
        return torch.float32 if f"blocks.{i}.{part}" in kept else dtype

    return nn.ModuleList(StepBlock(block, dtype, of(i, ATTENTION), of(i, MLP)) for i, block in enumerate(model.blocks))


class Step(nn.Module):
    """One scale: embed the codes, run the blocks, combine the guidance branches, apply the head.

    Every block has its own past tensors, token-major. The runtime binds the past as the prefix of a buffer whose tail
    receives the new keys or values, so nothing is copied. Signature: `flexvar_runtime.model.signatures`.
    """

    embed: Tensor

    def __init__(self, model: FlexVAR, dtype: torch.dtype, kept: Kept = ()) -> None:
        super().__init__()
        self.width, self.dtype = model.config.width, _floating(dtype)
        self.register_buffer("embed", _matrix(model.word_embed, torch.float32))
        self.blocks = _blocks(model, dtype, kept)
        self.head = linear(model.head, _floating(dtype))

    def forward(
        self,
        codes: Tensor,
        offset: Tensor,
        gamma1: list[Tensor],
        gamma2: list[Tensor],
        scale1: list[Tensor],
        scale2: list[Tensor],
        shift1: list[Tensor],
        shift2: list[Tensor],
        head_scale: Tensor,
        head_shift: Tensor,
        cond_rows: Tensor,
        uncond_rows: Tensor,
        t: Tensor,
        past_k: list[Tensor],
        past_v: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = codes @ self.embed + offset
        keys, values = [], []
        modulation = zip(gamma1, gamma2, scale1, scale2, shift1, shift2, strict=True)
        for block, parts, past in zip(self.blocks, modulation, zip(past_k, past_v, strict=True), strict=True):
            x, k, v = block(x, parts, past)
            keys.append(k)
            values.append(v)
        z = F.layer_norm(x, (self.width,), eps=NORM_EPS) * (1 + head_scale) + head_shift
        cond, uncond = z.index_select(0, cond_rows), z.index_select(0, uncond_rows)
        guided = cond + t[:, None, None] * (cond - uncond)  # exact before the head, because the head is linear
        return self.head(guided).float(), keys, values


class Prefill(nn.Module):
    """Keys and values of given scales in one block-causal pass. `Step` computes the same scale by scale. No logits.

    Its buffers have the same names as those of `Step`, so that both graphs can share one file of weights.
    """

    embed: Tensor

    def __init__(self, model: FlexVAR, dtype: torch.dtype, kept: Kept = ()) -> None:
        super().__init__()
        self.register_buffer("embed", _matrix(model.word_embed, torch.float32))
        self.blocks = _blocks(model, dtype, kept)

    def forward(
        self,
        codes: Tensor,
        offset: Tensor,
        gamma1: list[Tensor],
        gamma2: list[Tensor],
        scale1: list[Tensor],
        scale2: list[Tensor],
        shift1: list[Tensor],
        shift2: list[Tensor],
        scale: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The last block only computes keys and values, so of its modulation just scale1 and shift1 are used."""
        x, mask = codes @ self.embed + offset, scale[:, None] >= scale[None, :]
        keys, values = [], []
        modulation = zip(gamma1, gamma2, scale1, scale2, shift1, shift2, strict=False)
        for block, parts in zip(self.blocks[:-1], modulation, strict=False):
            x, k, v = block(x, parts, mask=mask)
            keys.append(k)
            values.append(v)
        last = self.blocks[-1]
        assert isinstance(last, StepBlock)
        _, k, v = last.project(x, scale1[-1], shift1[-1])
        return [*keys, k], [*values, v]


class Float32GroupNorm(nn.Module):
    """Group normalisation computed in float32, returned in the type of its input.

    It uses means of whole channels and elementwise operations, because every runtime has kernels for them. The CUDA
    provider of ONNX Runtime has no kernel for InstanceNormalization from opset 22 on, and expands GroupNormalization
    into a dozen passes. Means of whole channels also keep the maps in the layout of the convolutions.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("gain", _vector(norm.weight.view(norm.num_groups, -1), torch.float32))
        self.register_buffer("bias", _vector(norm.bias[:, None, None], torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean = self._group_mean(wide)
        if x.dtype == torch.bfloat16:  # saves a pass; the subtraction loses far less than the rounding of x
            variance = (self._group_mean(wide * wide) - mean * mean).clamp_min(0.0)
            factor = torch.rsqrt(variance + self.eps) * self.gain
            shift = self.bias - self._per_channel(mean * factor)
            return (wide * self._per_channel(factor) + shift).to(x.dtype)
        centred = wide - self._per_channel(mean.expand(-1, -1, self.gain.shape[1]))
        variance = self._group_mean(centred * centred)
        factor = torch.rsqrt(variance + self.eps) * self.gain
        return (centred * self._per_channel(factor) + self.bias).to(x.dtype)

    def _group_mean(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> mean of every group of channels (B, G, 1)."""
        return x.mean((2, 3)).reshape(-1, *self.gain.shape).mean(2, keepdim=True)

    @staticmethod
    def _per_channel(x: Tensor) -> Tensor:
        """x (B, G, C / G) -> (B, C, 1, 1)."""
        return x.flatten(1)[:, :, None, None]


class HalfConv(nn.Module):
    """A convolution in half precision with a float32 input. Its result is float32 if `widen` is set, else `dtype`."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, widen: bool) -> None:
        super().__init__()
        self.conv, self.dtype, self.widen = conv.to(dtype), dtype, widen

    def forward(self, x: Tensor) -> Tensor:
        result = self.conv(x.to(self.dtype))
        return result.float() if self.widen else result


def _float32_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(parent, name, Float32GroupNorm(child))


class Decode(nn.Module):
    """tokens (B, h, w) int32 -> image (B, 3, H, W) float32, not clamped. form: how it upsamples (`upsampling`)."""

    codebook: Tensor

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype, form: str = PLAIN) -> None:
        super().__init__()
        self.register_buffer("codebook", _vector(tokenizer.codebook_VD, dtype))
        self.post_quant_conv = copy.deepcopy(tokenizer.post_quant_conv).to(dtype)
        self.decoder = copy.deepcopy(tokenizer.decoder)
        replace_upsampling(self.decoder, form, dtype)  # before the weights are rounded
        self.decoder.to(dtype)
        _float32_norms(self.decoder)

    def forward(self, tokens: Tensor) -> Tensor:
        codes = F.embedding(tokens, self.codebook).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes)).float()


class Encode(nn.Module):
    """image (B, 3, H, W) float32 in -1..1 -> latent (B, D, h, w) float32, neither resized nor normalised.

    In half precision the residual stream, the first convolution and the last one stay float32: two of about fifty
    layers. Scaled pixels are not exact in half precision, and the result of the last convolution selects the token.
    `benchmarks/LOG.md` records the error.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(tokenizer.encoder)
        self.quant_conv = copy.deepcopy(tokenizer.quant_conv)
        _float32_norms(self.encoder)
        if dtype == torch.float32:
            return
        for parent in list(self.encoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and child is not self.encoder.conv_in:
                    setattr(parent, name, HalfConv(child, dtype, widen=name not in ("q", "k", "v")))

    def forward(self, image: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(image))


def graph_module(
    graph: str, model: FlexVAR, tokenizer: Tokenizer, dtype: torch.dtype, kept: Kept = (), decoder: str = PLAIN
) -> nn.Module:
    """The torch module of a graph of the bundle.

    dtype: the type that the graph computes in, torch.int8 for int8. kept: parts of the blocks that stay float32.
    decoder: how the decoder upsamples (`upsampling`).
    """
    if graph in (STEP, PREFILL):
        return {STEP: Step, PREFILL: Prefill}[graph](model, dtype, kept).eval()
    dtype = _floating(dtype)
    if graph == CONDITION:
        return Condition(model, dtype).eval()
    return (Encode(tokenizer, dtype) if graph == ENCODE else Decode(tokenizer, dtype, decoder)).eval()
