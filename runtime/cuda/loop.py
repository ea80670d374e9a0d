"""The loop protocol on a device: scale by scale, the host sees the tokens of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend
from ..loop import Draws
from ..output import ScaleTime
from .conditions import ConditionStore
from .device import Device
from .generation import DeviceGeneration, Options


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
    ) -> None:
        self._generation, self._device, self._backend = generation, device, backend
        self._begin = partial(generation.begin, conditions, labels, weights)
        self._begun: Draws | bool | None = None
        self._next = 0
        self._require_open = require_open

    def logits(self, index: int, previous_Bhw: NDArray[np.int32] | None) -> NDArray[np.float32]:
        self._start(True)
        if previous_Bhw is not None:
            given = np.ascontiguousarray(previous_Bhw, np.int32)  # kept until the download below has waited
            self._device.write(self._generation.tokens_on_device(index - 1), given)
        self._generation.enqueue_scale(index)
        return self._backend.download(self._generation.logits(index))

    def advance(self, draws: Draws) -> tuple[NDArray[np.int32], ScaleTime]:
        started = time.perf_counter()
        self._start(draws)
        i, self._next = self._next, self._next + 1
        schedule = self._generation.shape.schedule
        self._generation.enqueue_scale(i)
        self._generation.enqueue_draws(i, Options.of(draws, schedule))
        tokens = self._generation.download_tokens(i)
        return tokens, ScaleTime(schedule[i], time.perf_counter() - started, 0.0)

    def _start(self, draws: Draws | bool) -> None:
        """Once a request, and again where its draws change."""
        self._require_open()
        if draws == self._begun:
            return
        self._device.synchronize()
        if isinstance(draws, Draws):
            self._generation.seed(draws)
        self._begin()
        self._begun = draws
