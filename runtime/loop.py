"""The scale loop: buffers of one schedule, and one step of the graph per scale.

Keys and values live in one buffer for all blocks and scales. At every scale the past is a prefix of each block's part
and the new keys are its tail, so nothing is copied between scales.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backends.base import Array, Backend, Graph
from .conditions import Condition
from .errors import ArtifactRefused, InvalidInput
from .given import Given
from .graphs import new_names, past_names
from .manifest import GraphSpec, ModelFacts
from .noise import draws
from .output import ScaleTime
from .sampling import Sampling, sample
from .schedule import ScaleSchedule
from .tables import Tables

Float32 = NDArray[np.float32]
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Draws:
    """How tokens are drawn: the rule, and the stream (seed, index) of each image."""

    sampling: Sampling
    seed: int
    indices: tuple[int, ...]

    def noise(self, scale: int, positions: int) -> NDArray[np.uint32]:
        """24-bit draws of one scale, (images · positions,)."""
        return np.concatenate([draws(self.seed, index, scale, positions) for index in self.indices])


class Loop(Protocol):
    """The scales of one request, in order, on whatever runs them."""

    def logits(self, index: int, previous_Bhw: Tokens | None) -> Float32:
        """Guided logits (B, h·w, V) of scale `index` from given tokens of the scale before (None for the first).

        The result is a view: it holds until the next call.
        """

    def force(self, tokens: Sequence[Tokens]) -> tuple[ScaleTime, ...]:
        """Run the first scales on given tokens (B, h, w), without logits: in one pass where there is a graph for it.

        The time of one pass is shared out by tokens.
        """

    def advance(self, draws: Draws, given: Given | None = None) -> tuple[Tokens, ScaleTime]:
        """Run the next scale on the tokens before it. Returns its tokens (B, h, w), the given ones put back, and what
        it took.

        Raises ArtifactRefused where a row of the logits has no finite maximum.
        """


def refuse_logits(scale: int, size: tuple[int, int], got: str) -> ArtifactRefused:
    """The options were checked before: logits that cannot be drawn from are the bundle's fault."""
    return ArtifactRefused(
        f"scale {scale + 1} ({size[0]}x{size[1]}): {got}",
        expected="no NaN, no +inf and at least one finite logit in every row",
        fix="look for overflow upstream: try a bundle exported in bf16 or fp32",
    )


@dataclass(frozen=True)
class LoopBuffers:
    """Everything a generation writes into: allocated once for (schedule, images, guided), used again by the next."""

    schedule: ScaleSchedule
    images: int
    guided: bool
    cache: Array  # (2 · depth, all tokens, N, heads, head_size): keys of every block, then values
    logits: Array  # (B · tokens of the largest scale · V,)
    offsets: tuple[Float32, ...]  # of every scale after the first: (h·w, C)

    @property
    def sequences(self) -> int:
        return self.images * (2 if self.guided else 1)

    @classmethod
    def allocate(
        cls,
        backend: Backend,
        step: GraphSpec,
        model: ModelFacts,
        tables: Tables,
        schedule: ScaleSchedule,
        images: int,
        guided: bool,
    ) -> LoopBuffers:
        """Raises OutOfMemory where there is no memory for them (what fits is asked of the planner, before)."""
        dtype = next(tensor.dtype for tensor in step.outputs if tensor.name in new_names(model.depth))
        sequences = images * (2 if guided else 1)
        return cls(
            schedule,
            images,
            guided,
            backend.empty((2 * model.depth, schedule.tokens, sequences, model.heads, model.head_size), dtype),
            backend.empty((images * schedule.largest * model.vocabulary,), "float32"),
            tuple(tables.offset(h, w) for h, w in schedule.scales[1:]),
        )


def scale_of_tokens(sizes: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Number of the scale that every token belongs to, (L,)."""
    return np.repeat(np.arange(len(sizes), dtype=np.int32), [h * w for h, w in sizes])


def shared_time(sizes: Sequence[tuple[int, int]], seconds: float) -> tuple[ScaleTime, ...]:
    """Seconds of one pass over several scales, shared out by their tokens."""
    total = sum(h * w for h, w in sizes)
    return tuple(ScaleTime((h, w), seconds * h * w / total, 0.0) for h, w in sizes)


class ScaleLoop:
    """The loop on a backend whose arrays are NumPy arrays: draws and next inputs are computed on the host."""

    def __init__(
        self,
        backend: Backend,
        step: Graph,
        tables: Tables,
        model: ModelFacts,
        buffers: LoopBuffers,
        condition: Condition,
        weights: tuple[float, ...],
        open_prefill: Callable[[], Graph | None] = lambda: None,
    ) -> None:
        self._open_prefill = open_prefill
        self._backend, self._step, self._tables, self._model = backend, step, tables, model
        self._buffers, self._weights = buffers, weights
        conditioned = condition.tensors()
        self._first_input = conditioned.pop("first_input")
        self._modulation: dict[str, Any] = {name: backend.upload(array) for name, array in conditioned.items()}
        B = buffers.images
        self._constant: dict[str, Any] = {
            **self._modulation,
            "cond_rows": backend.upload(np.arange(B, dtype=np.int32)),
            "uncond_rows": backend.upload(np.arange(B, dtype=np.int32) + np.int32(B if buffers.guided else 0)),
        }
        self._past = self._next = 0
        self._tokens: Tokens | None = None

    def force(self, tokens: Sequence[Tokens]) -> tuple[ScaleTime, ...]:
        started, sizes = time.perf_counter(), self._buffers.schedule.scales[: len(tokens)]
        prefill = self._open_prefill() if len(tokens) > 1 else None
        if prefill is not None:
            self._prefill(prefill, tokens)
        else:
            for i in range(len(tokens)):
                self.logits(i, tokens[i - 1] if i else None)
        self._tokens, self._next = tokens[-1], len(tokens)
        return shared_time(sizes, time.perf_counter() - started)

    def _prefill(self, graph: Graph, tokens: Sequence[Tokens]) -> None:
        inputs = [self._codes_and_offset(i, tokens[i - 1] if i else None) for i in range(len(tokens))]
        codes, offset = (np.concatenate(parts, axis=1) for parts in zip(*inputs, strict=True))
        L = codes.shape[1]
        graph.run(
            {
                "codes": self._backend.upload(codes),
                "offset": self._backend.upload(offset),
                **{t.name: self._modulation[t.name] for t in graph.spec.inputs if t.name in self._modulation},
                "scale": self._backend.upload(scale_of_tokens(self._buffers.schedule.scales[: len(tokens)])),
            },
            {name: self._buffers.cache[i][:L] for i, name in enumerate(new_names(self._model.depth))},
        )
        self._past = L

    def advance(self, draws: Draws, given: Given | None = None) -> tuple[Tokens, ScaleTime]:
        i, B = self._next, self._buffers.images
        h, w = self._buffers.schedule[i]
        started = time.perf_counter()
        logits = self.logits(i, self._tokens).reshape(B * h * w, -1)
        stepped = time.perf_counter()
        sampling = draws.sampling
        try:
            flat = sample(logits, draws.noise(i, h * w), top_k=sampling.top_k_at(h, w), top_p=sampling.top_p)
        except InvalidInput as error:
            raise refuse_logits(i, (h, w), error.got) from error
        drawn = flat.reshape(B, h, w)
        self._tokens, self._next = drawn if given is None else given.put_back(i, drawn), i + 1
        return self._tokens, ScaleTime((h, w), stepped - started, time.perf_counter() - stepped)

    def logits(self, index: int, previous_Bhw: Tokens | None) -> Float32:
        buffers, model = self._buffers, self._model
        h, w = buffers.schedule[index]
        L, P, B = h * w, self._past, buffers.images
        logits = buffers.logits[: B * L * model.vocabulary].reshape(B, L, model.vocabulary)
        new = {name: buffers.cache[i][P : P + L] for i, name in enumerate(new_names(model.depth))}
        self._step.run(self.inputs(index, previous_Bhw), {"logits": logits, **new})
        self._past += L
        return self._backend.download(logits)

    def inputs(self, index: int, previous_Bhw: Tokens | None) -> dict[str, Any]:
        """What the step graph takes at scale `index`, after the scales before it."""
        codes, offset = self._codes_and_offset(index, previous_Bhw)
        past = {name: self._buffers.cache[i][: self._past] for i, name in enumerate(past_names(self._model.depth))}
        return {
            **self._constant,
            "codes": self._backend.upload(codes),
            "offset": self._backend.upload(offset),
            "t": self._backend.upload(np.full(self._buffers.images, self._weights[index], np.float32)),
            **past,
        }

    def _codes_and_offset(self, index: int, previous_Bhw: Tokens | None) -> tuple[Float32, Float32]:
        """codes (N, L, D) and offset (N, L, C): the first scale has no codes, only the class."""
        N = self._buffers.sequences
        if previous_Bhw is None:
            return np.zeros((N, 1, self._model.code_dim), np.float32), self._first_input
        h, w = self._buffers.schedule[index]
        codes = self._tables.next_codes(previous_Bhw, (h, w))
        offset = np.broadcast_to(self._buffers.offsets[index - 1], (N, h * w, self._model.width))
        return np.concatenate([codes] * (N // len(codes))), offset
