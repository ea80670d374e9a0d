"""The loop protocol on a device: scale by scale, the host sees the tokens of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Graph
from ..given import Given
from ..loop import Draws, shared_time
from ..output import ScaleTime
from .conditions import ConditionStore
from .device import Device
from .generation import DeviceGeneration, Options

Tokens = NDArray[np.int32]


class DeviceLoop:
    """One request on the buffers of a generation."""

    def __init__(
        self,
        generation: DeviceGeneration,
        device: Device,
        backend: Backend,
        conditions: ConditionStore,
        labels: Sequence[int],
        weights: Sequence[float],
        require_open: Callable[[], None],
        open_prefill: Callable[[], Graph | None],
        retry: Callable[[Callable[[], None]], None],
    ) -> None:
        """retry: runs an action, and once more after it ran out of memory."""
        self._generation, self._device, self._backend = generation, device, backend
        self._begin = partial(generation.begin, conditions, labels, weights)
        self._begun: Draws | bool | None = None
        self._next = 0
        self._require_open, self._open_prefill, self._retry = require_open, open_prefill, retry

    def logits(self, index: int, previous_Bhw: Tokens | None) -> NDArray[np.float32]:
        self._start(True)
        if previous_Bhw is not None:
            given = np.ascontiguousarray(previous_Bhw, np.int32)  # kept until the download below has waited
            self._device.write(self._generation.tokens_on_device(index - 1), given)
        self._enqueue_scale(index)
        return self._backend.download(self._generation.logits(index))

    def force(self, tokens: Sequence[Tokens]) -> tuple[ScaleTime, ...]:
        started, generation = time.perf_counter(), self._generation
        self._start(True)
        prefill = self._open_prefill() if len(tokens) > 1 else None
        given = [np.ascontiguousarray(scale, np.int32) for scale in tokens]  # kept until the wait below
        for i, scale in enumerate(given):
            self._device.write(generation.tokens_on_device(i), scale)
        if prefill is not None:
            self._retry(partial(generation.prefill, prefill, given))
        else:
            for i in range(len(given)):
                self._enqueue_scale(i)
        self._device.synchronize()
        self._next = len(given)
        return shared_time(generation.shape.schedule.scales[: len(given)], time.perf_counter() - started)

    def advance(self, draws: Draws, given: Given | None = None) -> tuple[Tokens, ScaleTime]:
        started = time.perf_counter()
        self._start(draws)
        i, self._next = self._next, self._next + 1
        schedule = self._generation.shape.schedule
        self._enqueue_scale(i)
        self._generation.enqueue_draws(i, Options.of(draws, schedule))
        tokens = self._generation.download_tokens(i)
        kept = tokens if given is None else given.put_back(i, tokens)
        if kept is not tokens:
            tokens = np.ascontiguousarray(kept, np.int32)
            self._device.write(self._generation.tokens_on_device(i), tokens)
            self._device.synchronize()
        return tokens, ScaleTime(schedule[i], time.perf_counter() - started, 0.0)

    def _start(self, draws: Draws | bool) -> None:
        """Once a request, and again where its draws change."""
        self._require_open()
        if draws == self._begun:
            return
        self._device.synchronize()
        if isinstance(draws, Draws):
            self._generation.seed(draws)
        self._retry(self._begin)
        self._begun = draws

    def _enqueue_scale(self, i: int) -> None:
        self._retry(partial(self._generation.enqueue_scale, i))
