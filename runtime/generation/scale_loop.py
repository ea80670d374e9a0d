"""The loop over the scales of one request: what is the same on the host and on a device."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Array
from ..errors import ArtifactRefused
from ..model.signatures import new_names, past_names
from ..model.tables import Tables
from ..model.tensors import GraphSpec
from ..output import ScaleTime
from ..request import Request

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Finished:
    """A finished generation: pixels (B, H, W, 3), tokens (B, h, w) of every scale, and the decoder's images (B, 3, H,
    W) if they were to be kept.

    scales: time of every scale that ran on its own. decode: seconds of the decoder on its own. mode and device: see
    `output.Timings`.
    """

    pixels: Pixels
    tokens: tuple[Tokens, ...]
    decoded: Float32 | None
    scales: tuple[ScaleTime, ...]
    decode: float
    mode: str = "steps"
    device: float | None = None


class ScaleLoop(ABC):
    """The scales of one request, in order. Iterating runs those that are left and gives the tokens and time of each.

    The first scales of an edit may be given as a whole. They run together, without drawing.
    """

    def __init__(self, request: Request, images: Callable[[Tokens, bool], tuple[Pixels, Float32 | None]]) -> None:
        """images: see `Generator.images`."""
        self.request, self._images = request, images
        self.tokens: list[Tokens] = []
        self.times: list[ScaleTime] = []

    def __iter__(self) -> Iterator[tuple[Tokens, ScaleTime]]:
        given = self.request.given
        if not self.tokens and given is not None and given.forced:
            forced = given.tokens[: given.forced]
            yield from zip(forced, self.force(forced), strict=True)
        while len(self.tokens) < len(self.request.schedule):
            tokens, spent = self._draw(len(self.tokens))
            self.tokens.append(tokens)
            self.times.append(spent)
            yield tokens, spent

    def force(self, tokens: Sequence[Tokens]) -> tuple[ScaleTime, ...]:
        """Run the first scales on given tokens (B, h, w): in one pass if there is a graph for it, else one by one.

        The time of one pass is divided among its scales by their tokens.
        """
        started, sizes = time.perf_counter(), self.request.schedule.scales[: len(tokens)]
        self._force(tokens)
        seconds, total = time.perf_counter() - started, sum(h * w for h, w in sizes)
        times = tuple(ScaleTime((h, w), seconds * h * w / total, 0.0) for h, w in sizes)
        self.tokens += tokens
        self.times += times
        return times

    @abstractmethod
    def _force(self, tokens: Sequence[Tokens]) -> None: ...

    @abstractmethod
    def _draw(self, scale: int) -> tuple[Tokens, ScaleTime]:
        """Run the next scale on the tokens before it, and draw its tokens (B, h, w). Kept tokens are put back.

        Raises ArtifactRefused if a row of the logits has no finite maximum.
        """

    @abstractmethod
    def logits(self, scale: int, previous_Bhw: Tokens | None) -> Float32:
        """Guided logits (B, h·w, V) of a scale from given tokens of the scale before it (None for the first).

        The result is a view that holds until the next call.
        """

    def finish(self, keep_decoded: bool) -> Finished:
        """Run the scales that are left, then the decoder."""
        for _ in self:
            pass
        started = time.perf_counter()
        pixels, decoded = self._images(self.tokens[-1], keep_decoded)
        return Finished(pixels, tuple(self.tokens), decoded, tuple(self.times), time.perf_counter() - started)


@dataclass(frozen=True)
class StepTensors:
    """The tensors of the step graph that live as long as a request: NumPy arrays on a host, device arrays on a device.

    modulation: outputs of the condition graph by name. cond_rows, uncond_rows (B,): the sequence of each image with and
    without its class. cache (2 · depth, all tokens, N, heads, head_size): keys of every block, then values. logits:
    room for those of the largest scale."""

    modulation: Mapping[str, Array]
    cond_rows: Array
    uncond_rows: Array
    cache: Array
    logits: Array
    vocabulary: int

    @property
    def depth(self) -> int:
        return int(self.cache.shape[0]) // 2

    def logits_of(self, new: int) -> Array:
        """Logits (B, new, V) in the buffer that all scales share."""
        B, V = self.cond_rows.shape[0], self.vocabulary
        return self.logits[: B * new * V].reshape(B, new, V)

    def step(self, codes: Array, offset: Array, t: Array, past: int, new: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of the step graph for `new` tokens after `past` ones.

        The past is a prefix of each part of the cache and the new keys are its tail, so nothing is copied.
        """
        inputs = {
            "codes": codes,
            "offset": offset,
            **self.modulation,
            "cond_rows": self.cond_rows,
            "uncond_rows": self.uncond_rows,
            "t": t,
            **{name: self.cache[i][:past] for i, name in enumerate(past_names(self.depth))},
        }
        return inputs, {"logits": self.logits_of(new), **self._tail(past, new)}

    def prefill(
        self, spec: GraphSpec, codes: Array, offset: Array, scale: Array
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of the prefill graph. scale (L,): the number of the scale that every token belongs to."""
        modulation = {t.name: self.modulation[t.name] for t in spec.inputs if t.name in self.modulation}
        return {"codes": codes, "offset": offset, **modulation, "scale": scale}, self._tail(0, codes.shape[1])

    def _tail(self, past: int, new: int) -> dict[str, Array]:
        return {name: self.cache[i][past : past + new] for i, name in enumerate(new_names(self.depth))}


def prefill_inputs(
    tables: Tables, given: Sequence[Tokens], sizes: Sequence[tuple[int, int]], first_input: Float32
) -> tuple[Float32, Float32, NDArray[np.int32]]:
    """codes (N, L, D), offset (N, L, C) and scale (L,) of given scales (B, h, w), for `StepTensors.prefill`.

    first_input (N, 1, C): of the condition. The first scale has no codes, only the class."""
    N, _, C = first_input.shape
    codes, offsets = [np.zeros((N, 1, tables.codebook.shape[1]), np.float32)], [first_input]
    for previous, (h, w) in zip(given[:-1], sizes[1:], strict=True):
        codes.append(np.tile(tables.next_codes(previous, (h, w)), (N // len(previous), 1, 1)))
        offsets.append(np.broadcast_to(tables.offset(h, w), (N, h * w, C)))
    scale = np.repeat(np.arange(len(sizes), dtype=np.int32), [h * w for h, w in sizes])
    return np.concatenate(codes, axis=1), np.concatenate(offsets, axis=1), scale


def refuse_logits(scale: int, size: tuple[int, int], row: str) -> ArtifactRefused:
    """The error for logits that cannot be drawn from. The options were checked before, so the bundle is at fault."""
    return ArtifactRefused(
        f"Scale {scale + 1} ({size[0]}x{size[1]}): {row}",
        expected="no NaN, no +inf and at least one finite logit in every row",
        fix="Use a bundle exported with --precision bf16 or fp32, whose activations do not overflow.",
    )
