"""Scale-by-scale generation with an explicit KV cache. Every runtime must reproduce it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidInput
from .sampling import RULES, TRAINED_SIDE, draw, guidance_weight, is_greedy, probabilities
from .scales import Scales, ScalesLike, as_schedule
from .tokenizer import Tokenizer
from .transformer import FlexVAR, KVCache

Uniforms = Callable[[int, int, int], Tensor]
"""(scale index, positions, batch) -> uniforms (batch, positions) in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Guidance and sampling of one generation. The defaults are those of the published evaluation at 256 px.

    cfg: guidance scale. Guidance is off where its weight is 0 at every scale: cfg 0 with "ramp", cfg 1 with "constant".
    The unconditional branch is then not computed.
    rule: "ramp" or "constant", see `guidance_weight`.
    top_k, top_p: see `probabilities`.
    upstream_greedy: take the argmax at the scales where the published evaluation does.
    max_side: at a square scale with a larger side the argmax is taken. At any scale with a larger side the ramp is cfg.

    Raises InvalidInput.
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
            ("top_k", self.top_k >= 0, "0 (off) or the number of codes to keep"),
            ("top_p", 0 <= self.top_p <= 1, "from 0 (off) to 1"),
            ("max_side", self.max_side >= 1, "at least 1"),
        ):
            if not valid:
                raise InvalidInput(
                    f"{name} is {getattr(self, name)!r}, but it must be {expected}.",
                    expected=expected,
                    fix="Correct the options.",
                )


@dataclass(frozen=True)
class Given:
    """Tokens of an image that a generation keeps.

    tokens: the image's own tokens (B, h, w) at every scale.
    keep: (B, h, w) bool at every scale, true where the token is kept.
    """

    tokens: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]

    @property
    def forced(self) -> int:
        """Number of leading scales that are kept whole. Nothing is drawn for them."""
        return next((i for i, keep in enumerate(self.keep) if not keep.all()), len(self.keep))


@dataclass(frozen=True)
class ScaleOutput:
    """One generated scale.

    size: (h, w). tokens: (B, h, w). logits: the guided logits (B, h·w, V) that the tokens were drawn from, or (B, 0, V)
    for a scale that was prefilled.
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
    """Tokens (B, h, w) of every scale and the decoded images (B, 3, H, W), not clamped.

    The arguments are those of `iter_scales`. Raises InvalidInput.
    """
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
    """Generate scale by scale, one ScaleOutput for each.

    labels: B class labels; `config.null_class` means "no class".
    uniforms: source of the uniform draws. The default is torch's global generator.
    forced: tokens (B, h, w) of every scale that are fed to the next scale in place of the sampled ones (teacher forcing
    through the cache). The last scale may be left out.
    given: tokens to keep. They replace the sampled ones after every draw.
    prefill: compute the leading scales that `given` keeps whole in one pass, not one by one.
    Raises InvalidInput when the first scale is asked for.
    """
    options, scales = options or Options(), as_schedule(scales)
    _check_request(model, labels, scales, forced, given)
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


def _check_request(
    model: FlexVAR, labels: Sequence[int], scales: Scales, forced: Sequence[Tensor] | None, given: Given | None
) -> None:
    null = model.config.null_class
    if len(labels) < 1 or not all(0 <= label <= null for label in labels):
        raise InvalidInput(
            f"labels is {list(labels)}, but it must hold one or more whole numbers from 0 to {null}.",
            expected=f"one or more from 0 to {null}",
            fix=f"Pass one label for each image; {null} means no class.",
        )
    if forced is not None and len(forced) not in (len(scales), len(scales) - 1):
        raise InvalidInput(
            f"forced holds tokens of {len(forced)} scales, but the schedule has {len(scales)}.",
            expected=f"{len(scales)} scales",
            fix="Pass one token map for each scale.",
        )
    if given is not None:
        shapes = [(len(labels), *size) for size in scales]
        for name in ("tokens", "keep"):
            got = [tuple(one.shape) for one in getattr(given, name)]
            if got != shapes:
                raise InvalidInput(
                    f"given.{name} has the shapes {got}, but they must be {shapes}.",
                    expected=str(shapes),
                    fix="Pass one map for each image and scale.",
                )
    if model.training:
        raise InvalidInput(
            "The model is in training mode.", expected="evaluation mode", fix="Call model.eval() before you generate."
        )


def _sample(logits: Tensor, index: int, size: tuple[int, int], options: Options, uniforms: Uniforms | None) -> Tensor:
    B, L, _ = logits.shape
    greedy = options.top_k == 1 or (options.upstream_greedy and is_greedy(size, options.max_side))
    if uniforms is None:
        u = torch.rand(B, L, dtype=torch.float64, device=logits.device)
    else:
        u = uniforms(index, L, B).to(logits.device)
        if u.shape != (B, L):
            raise InvalidInput(
                f"uniforms returned the shape {tuple(u.shape)} at scale {index}, but it must be {(B, L)}.",
                expected=str((B, L)),
                fix="Return one draw for each image and position.",
            )
    return draw(probabilities(logits, 1 if greedy else options.top_k, options.top_p), u).view(B, *size)
