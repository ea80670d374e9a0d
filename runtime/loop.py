"""The scale loop: buffers of one schedule, and one step of the graph per scale.

Keys and values live in one buffer for all blocks and scales. At every scale the past is a prefix of each block's part
and the new keys are its tail, so nothing is copied between scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Array, Backend, Graph, host_dtype
from .graphs import new_names, past_names
from .manifest import GraphSpec, ModelFacts
from .memory import loop_bytes, require
from .schedule import ScaleSchedule
from .tables import Tables

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Condition:
    """What the classes decide, one row a sequence: modulation (N, depth, 6, C), head_modulation (N, 2, C),
    first_input (N, 1, C)."""

    modulation: Float32
    head_modulation: Float32
    first_input: Float32

    @classmethod
    def stack(cls, rows: Sequence[Condition]) -> Condition:
        return cls(*(np.concatenate([getattr(row, field.name) for row in rows]) for field in fields(cls)))


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
        """Raises OutOfMemory where the buffers of all scales do not fit."""
        dtype = next(tensor.dtype for tensor in step.outputs if tensor.name in new_names(model.depth))
        itemsize = host_dtype(dtype).itemsize
        available = backend.available_bytes()
        needed = loop_bytes(model, schedule, images, guided, itemsize)
        one = loop_bytes(model, schedule, 1, guided, itemsize)
        fits = 0 if available is None else available // one
        fix = f"use a batch of at most {fits}" if fits else "use a smaller schedule, or a machine with more memory"
        require(needed, available, f"a batch of {images} at schedule {schedule}", fix)
        sequences = images * (2 if guided else 1)
        return cls(
            schedule,
            images,
            guided,
            backend.empty((2 * model.depth, schedule.tokens, sequences, model.heads, model.head_size), dtype),
            backend.empty((images * schedule.largest * model.vocabulary,), "float32"),
            tuple(tables.offset(h, w) for h, w in schedule.scales[1:]),
        )


class ScaleLoop:
    """Runs the step graph over a schedule. The caller samples; the loop never knows how."""

    def __init__(
        self,
        backend: Backend,
        step: Graph,
        tables: Tables,
        model: ModelFacts,
        buffers: LoopBuffers,
        condition: Condition,
        weights: tuple[float, ...],
    ) -> None:
        self._backend, self._step, self._tables, self._model = backend, step, tables, model
        self._buffers, self._weights = buffers, weights
        self._first_input = condition.first_input
        B = buffers.images
        self._constant: dict[str, Any] = {
            "modulation": backend.upload(condition.modulation),
            "head_modulation": backend.upload(condition.head_modulation),
            "cond_rows": backend.upload(np.arange(B, dtype=np.int32)),
            "uncond_rows": backend.upload(np.arange(B, dtype=np.int32) + np.int32(B if buffers.guided else 0)),
        }
        self._past = 0

    def logits(self, index: int, previous_Bhw: NDArray[np.int32] | None) -> Float32:
        """Guided logits (B, h·w, V) of scale `index` from the tokens of the scale before (None for the first).

        The result is a view of the loop's buffer: it holds until the next call.
        """
        buffers, model = self._buffers, self._model
        h, w = buffers.schedule[index]
        L, P, B = h * w, self._past, buffers.images
        codes, offset = self._inputs(index, previous_Bhw)
        inputs = {
            **self._constant,
            "codes": self._backend.upload(codes),
            "offset": self._backend.upload(offset),
            "t": self._backend.upload(np.full(B, self._weights[index], np.float32)),
        }
        logits = buffers.logits[: B * L * model.vocabulary].reshape(B, L, model.vocabulary)
        outputs = {"logits": logits}
        for i, (past, new) in enumerate(zip(past_names(model.depth), new_names(model.depth), strict=True)):
            inputs[past] = buffers.cache[i][:P]
            outputs[new] = buffers.cache[i][P : P + L]
        self._step.run(inputs, outputs)
        self._past += L
        return self._backend.download(logits)

    def _inputs(self, index: int, previous_Bhw: NDArray[np.int32] | None) -> tuple[Float32, Float32]:
        """codes (N, L, D) and offset (N, L, C): the first scale has no codes, only the class."""
        N = self._buffers.sequences
        if previous_Bhw is None:
            return np.zeros((N, 1, self._model.code_dim), np.float32), self._first_input
        h, w = self._buffers.schedule[index]
        codes = self._tables.next_codes(previous_Bhw, (h, w))
        offset = np.broadcast_to(self._buffers.offsets[index - 1], (N, h * w, self._model.width))
        return np.concatenate([codes] * (N // len(codes))), offset
