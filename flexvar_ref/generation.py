"""Scale-by-scale generation with an explicit KV cache: the definition of correct for every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import RULES, TRAINED_SIDE, draw, guidance_weight, is_greedy, probabilities
from .scales import Scales, ScalesLike, as_schedule
from .tokenizer import Tokenizer
from .transformer import FlexVAR, KVCache

# (scale index, positions, batch) -> uniforms (batch, positions) in (0, 1)
Uniforms = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Guidance and sampling of one generation; the defaults are those of the published evaluation at 256 px.

    cfg, rule: "ramp" or "constant", see `guidance_weight`. Guidance is off, and no second branch is run, where its
    weight is 0 at every scale: cfg 0 with "ramp", cfg 1 with "constant".
    top_k, top_p: see `probabilities`. upstream_greedy: take the argmax where the published evaluation does.
    max_side: square scales above it are greedy, and the ramp is cfg above it.
    """

    cfg: float = 2.5
    rule: str = "ramp"
    top_k: int = 900
    top_p: float = 0.95
    upstream_greedy: bool = True
    max_side: int = TRAINED_SIDE

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("cfg", math.isfinite(self.cfg), "a finite number"),
            ("rule", self.rule in RULES, "one of " + ", ".join(RULES)),
            ("top_k", self.top_k >= 0, "0 (off) or how many codes to keep"),
            ("top_p", 0 <= self.top_p <= 1, "0 (off) to 1"),
            ("max_side", self.max_side >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"got {name} {getattr(self, name)!r}; expected {expected}; fix: correct the options")


@dataclass(frozen=True)
class Given:
    """What an edit keeps: the image's own tokens (B, h, w) of every scale, and where they stay, (B, h, w) bool."""

    tokens: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]

    @property
    def forced(self) -> int:
        """Leading scales that are kept whole: nothing is drawn for them."""
        return next((i for i, keep in enumerate(self.keep) if not keep.all()), len(self.keep))


@dataclass(frozen=True)
class ScaleOutput:
    """One scale: its (h, w), its tokens (B, h, w) and the guided logits (B, h·w, V) they were drawn from.

    A scale that was prefilled has no logits: (B, 0, V).
    """

    size: tuple[int, int]
    tokens: Tensor
    logits: Tensor


def generate(
    model: FlexVAR,
    tokenizer: Tokenizer,
    labels: Sequence[int],
    scales: ScalesLike,
    options: Options | None = None,
    uniforms: Uniforms | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Tokens (B, h, w) of every scale and the decoder's image (B, 3, H, W), not clamped."""
    tokens = [scale.tokens for scale in iter_scales(model, labels, scales, options, uniforms)]
    with torch.inference_mode():
        return tokens, tokenizer.decode(tokens[-1])


def iter_scales(
    model: FlexVAR,
    labels: Sequence[int],
    scales: ScalesLike,
    options: Options | None = None,
    uniforms: Uniforms | None = None,
    forced: Sequence[Tensor] | None = None,
    given: Given | None = None,
    prefill: bool = True,
) -> Iterator[ScaleOutput]:
    """Generate scale by scale.

    labels: B class labels (`config.null_class` for "no class"). uniforms: source of the draws (default: torch's
    generator). forced: tokens (B, h, w) of every scale to be fed on instead of the sampled ones (teacher forcing
    through the cache; the last may be left out). given: tokens put back after every draw where they are to be kept;
    scales kept whole are computed in one pass, or one by one without `prefill`. Raises ValueError, when the first
    scale is asked for.
    """
    options, scales = options or Options(), as_schedule(scales)
    _check(model, labels, scales, forced, given)
    weights = [
        guidance_weight(options.rule, options.cfg, i, len(scales), size, options.max_side)
        for i, size in enumerate(scales)
    ]
    guided, B = any(t != 0 for t in weights), len(labels)
    rows = list(labels) + [model.config.null_class] * (B if guided else 0)
    labels_N = torch.tensor(rows, dtype=torch.long, device=model.head.weight.device)
    cache: KVCache | None = None
    tokens = torch.empty(0)
    first = given.forced if given is not None and prefill else 0
    if given is not None and first:
        with torch.inference_mode():
            repeated = [scale.repeat(len(rows) // B, 1, 1) for scale in given.tokens[:first]]
            cache = model.prefill(labels_N, repeated, scales[:first])
        for size, tokens in zip(scales[:first], given.tokens[:first], strict=True):
            yield ScaleOutput(size, tokens, torch.empty(B, 0, model.config.vocabulary, device=labels_N.device))
    for i, (size, t) in list(enumerate(zip(scales, weights, strict=True)))[first:]:
        with torch.inference_mode():
            cond = model.condition(labels_N)
            if i == 0:
                x = model.first_input(labels_N)
            else:
                x = model.next_input(tokens, scales[i - 1], size).repeat(len(rows) // B, 1, 1)
            hidden, cache = model.step(x, cond, cache)
            logits = model.logits(hidden, cond)
            if guided:
                logits = (1 + t) * logits[:B] - t * logits[B:]
            tokens = _sample(logits, i, size, options, uniforms)
            if given is not None:
                tokens = torch.where(given.keep[i], given.tokens[i].long(), tokens)
        yield ScaleOutput(size, tokens, logits)
        if forced is not None and i < len(forced):
            tokens = forced[i].long()


def _check(
    model: FlexVAR, labels: Sequence[int], scales: Scales, forced: Sequence[Tensor] | None, given: Given | None
) -> None:
    null = model.config.null_class
    if len(labels) < 1 or not all(0 <= label <= null for label in labels):
        raise ValueError(f"got labels {list(labels)}; expected one or more from 0 to {null}; fix: {null} is no class")
    if forced is not None and len(forced) not in (len(scales), len(scales) - 1):
        raise ValueError(f"got forced tokens of {len(forced)} scales; expected {len(scales)}; fix: one map a scale")
    if given is not None:
        shapes = [(len(labels), *size) for size in scales]
        for name in ("tokens", "keep"):
            got = [tuple(one.shape) for one in getattr(given, name)]
            if got != shapes:
                raise ValueError(f"got given {name} of {got}; expected {shapes}; fix: one map an image and scale")
    if model.training:
        raise ValueError("got a model in training mode; expected evaluation mode; fix: call model.eval() first")


def _sample(logits: Tensor, index: int, size: tuple[int, int], options: Options, uniforms: Uniforms | None) -> Tensor:
    B, L, _ = logits.shape
    greedy = options.top_k == 1 or (options.upstream_greedy and is_greedy(size, options.max_side))
    if uniforms is None:
        u = torch.rand(B, L, dtype=torch.float64, device=logits.device)
    else:
        u = uniforms(index, L, B).to(logits.device)
        if u.shape != (B, L):
            raise ValueError(f"got uniforms of shape {tuple(u.shape)}; expected {(B, L)}; fix: one draw a position")
    return draw(probabilities(logits, 1 if greedy else options.top_k, options.top_p), u).view(B, *size)
