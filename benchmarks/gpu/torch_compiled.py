"""The fastest torch peer that we know: the deployment modules with torch.compile, captured as one CUDA graph.

Blocks are compiled once and used for all of them. Keys and values are written in place. The graph holds the whole
generation, with its draws and its decoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexvar_export.modules import Condition, Dense, Step, StepBlock
from flexvar_export.parity import relative_error
from flexvar_export.proof import Case
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Sampling, ScaleSchedule

from .random_models import default_guidance

RECOMPILES = 256  # by default torch stops compiling a function after 8
WARM_UPS = 3


def to_pixels(image_BCHW: Tensor) -> Tensor:
    """(B, H, W, 3) uint8, as `flexvar_runtime.pictures.pixels.to_uint8`."""
    return (image_BCHW.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class PeerBlock(nn.Module):
    """A `StepBlock` that writes keys and values into a cache (N, heads, all tokens, 64), from `past` on."""

    def __init__(self, block: StepBlock) -> None:
        super().__init__()
        self.block, parts = block, (block.q, block.k, block.v)
        weight, bias = torch.cat([part.weight for part in parts], 1), torch.cat([part.bias for part in parts])
        self.qkv = Dense(weight, bias)  # one product here; ONNX Runtime is faster with three

    def forward(self, x: Tensor, modulation: list[Tensor], keys: Tensor, values: Tensor, past: int) -> Tensor:
        block = self.block
        N, L, _ = x.shape
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        hidden = (block._norm(x) * (1 + scale1) + shift1).to(block.dtype)
        q, k, v = self.qkv(hidden).view(N, L, 3, block.heads, block.head_size).unbind(2)
        q = (block._unit(q) * block.temperature).to(block.dtype).transpose(1, 2)
        keys[:, :, past : past + L] = block._unit(k).to(block.dtype).transpose(1, 2)
        values[:, :, past : past + L] = v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys[:, :, : past + L], values[:, :, : past + L], scale=1.0)
        x = x + block.proj(out.transpose(1, 2).reshape(N, L, block.width)).float() * gamma1
        hidden = F.gelu(block.fc1(block._norm(x) * (1 + scale2) + shift2), approximate="tanh")
        result: Tensor = x + block.fc2(hidden).float() * gamma2
        return result


class Eager:
    """The modules in half precision on a device, with the constants of a schedule."""

    def __init__(self, model: FlexVAR, tokenizer: Tokenizer, schedule: ScaleSchedule, device: torch.device) -> None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.device, self.dtype, self.schedule = device, dtype, schedule
        self.depth, self.heads, self.head_size = model.config.depth, model.config.heads, model.config.head_size
        self.classes, self.null, self.code_dim = model.config.classes, model.config.null_class, model.config.code_dim
        self.condition = Condition(model, dtype).to(device).eval()
        self.step = Step(model, dtype).to(device).eval()
        self.blocks = [PeerBlock(block) for block in self.step.blocks if isinstance(block, StepBlock)]
        decoder = nn.Sequential(copy.deepcopy(tokenizer.post_quant_conv), copy.deepcopy(tokenizer.decoder))
        self.decoder = decoder.to(device, dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.codebook = tokenizer.codebook_VD.detach().to(device)
        bias = model.word_embed.bias
        self.offsets = [(model.positions(*size) + bias).detach().to(device) for size in schedule]
        self.weights = torch.tensor(
            default_guidance().weights(schedule), device=device
        )  # torch.compile would make plain numbers constants

    def head(self, x: Tensor, modulation: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        """Guided logits (B, L, V) of both branches (2B, L, C)."""
        scale, shift = modulation
        z = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
        cond, uncond = z.chunk(2)
        logits: Tensor = self.step.head(cond + t * (cond - uncond)).float()
        return logits

    def next_codes(self, tokens_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
        codes = F.embedding(tokens_Bhw, self.codebook).permute(0, 3, 1, 2)
        resized = F.interpolate(codes, size=size, mode="bicubic").flatten(2).transpose(1, 2)
        return resized.repeat(2, 1, 1)

    def pixels(self, tokens_Bhw: Tensor) -> Tensor:
        codes = F.embedding(tokens_Bhw, self.codebook.to(self.dtype)).permute(0, 3, 1, 2)  # channels last already
        return to_pixels(self.decoder(codes))


def sample_sorted(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Tokens (B, L), drawn from the top_k in descending order. This needs no sort of the vocabulary.

    The distribution is the published one, except for ties at the threshold. The order of the inverse CDF differs.
    """
    values, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    mass = values.softmax(-1)
    before = mass.cumsum(-1) - mass
    kept = torch.where(before < (top_p or 1.0), mass, 0.0).cumsum(-1)
    u = torch.rand(*logits.shape[:2], 1, device=logits.device)
    place = (kept <= u * kept[..., -1:]).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
    return order.gather(-1, place)[..., 0]


class CompiledPeer:
    """Generations of one batch at a time: `prepare` it, `run` it as often as wanted, `release` it."""

    def __init__(self, eager: Eager, *, compiler: str | None, dynamic: bool = True) -> None:
        """compiler: a backend of torch.compile, or None to compile nothing. dynamic: compile for all shapes at once."""
        self.eager, self.mode = eager, ""
        import torch._dynamo

        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = RECOMPILES

        def compiled(work: Callable[..., Tensor], dynamic: bool) -> Callable[..., Tensor]:
            return work if compiler is None else torch.compile(work, dynamic=dynamic, backend=compiler)

        self._block, self._head = compiled(PeerBlock.forward, dynamic), compiled(Eager.head, dynamic)
        self._decode = compiled(Eager.pixels, False)
        self._replay: Callable[[], object] | None = None
        self._state: dict[str, Any] = {}

    @torch.no_grad()
    def prepare(self, labels: Sequence[int]) -> None:
        """Allocate, compile, warm up and capture. The condition is computed here: the runtime caches it, too."""
        self._begin(labels)
        if self.eager.device.type != "cuda":
            self.mode, self._replay = "eager", self._generate
            self._generate()
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._generate()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._generate()
        self.mode, self._replay = "cuda-graph", graph.replay

    @torch.no_grad()
    def run(self) -> Tensor:
        """Pixels (B, H, W, 3) on the host."""
        assert self._replay is not None
        self._replay()
        pixels: Tensor = self._state["pixels"].cpu()
        return pixels

    def release(self) -> None:
        self._replay = None
        self._state.clear()
        if self.eager.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def relative_error(self, case: Case) -> float:
        """The largest relative error of the logits over the scales of a proof, whose tokens are fed at every scale."""
        self._begin(case.labels)
        previous, worst = None, 0.0
        for i in range(len(case.schedule)):
            logits = self._logits(i, previous).float().cpu().numpy()
            worst = max(worst, relative_error(logits, case.logits[i]))
            previous = torch.from_numpy(case.tokens[i]).long().to(self.eager.device)
        self.release()
        return worst

    def _begin(self, labels: Sequence[int]) -> None:
        eager, N = self.eager, 2 * len(labels)
        rows = torch.tensor([*labels, *[eager.null] * len(labels)], dtype=torch.int32, device=eager.device)
        *blocks, scale, shift, first = eager.condition(rows)
        shape = (N, eager.heads, eager.schedule.tokens, eager.head_size)
        caches = [torch.zeros(2, *shape, dtype=eager.dtype, device=eager.device) for _ in range(eager.depth)]
        self._state = {
            "modulation": [[part.contiguous() for part in blocks[i :: eager.depth]] for i in range(eager.depth)],
            "head": (scale.contiguous(), shift.contiguous()),
            "first": first,
            "keys": [cache[0] for cache in caches],
            "values": [cache[1] for cache in caches],
        }

    def _logits(self, i: int, previous_Bhw: Tensor | None) -> Tensor:
        eager, state, size = self.eager, self._state, self.eager.schedule[i]
        past = sum(h * w for h, w in eager.schedule.scales[:i])
        if previous_Bhw is None:
            x = state["first"]
        else:
            x = eager.next_codes(previous_Bhw, size) @ eager.step.embed + eager.offsets[i]
        for block, modulation, keys, values in zip(
            eager.blocks, state["modulation"], state["keys"], state["values"], strict=True
        ):
            x = self._block(block, x, modulation, keys, values, past)
        return self._head(eager, x, state["head"], eager.weights[i])

    def _generate(self) -> None:
        sampling, tokens = Sampling(), None
        for i, (h, w) in enumerate(self.eager.schedule):
            logits = self._logits(i, tokens)
            tokens = sample_sorted(logits, sampling.top_k_at(h, w), sampling.top_p).view(-1, h, w)
        assert tokens is not None
        self._state["pixels"] = self._decode(self.eager, tokens)
