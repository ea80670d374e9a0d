"""The scale loop of one request on a device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..cuda.device import Device
from ..output import ScaleTime
from ..request import Request
from .captured import CapturedGeneration
from .generator import Generator
from .scale_loop import Finished, ScaleLoop

Tokens = NDArray[np.int32]


class DeviceLoop(ScaleLoop):
    """One request on the buffers of its shape. Run scale by scale, the host waits for the tokens of each."""

    def __init__(self, generator: Generator, device: Device, request: Request, generation: CapturedGeneration) -> None:
        super().__init__(request, generator.images)
        self._generator, self._device, self._generation = generator, device, generation
        self._begun = False

    def _begin(self) -> None:
        """Send the values of the request to the device, once."""
        self._generator.require_open()
        if not self._begun:
            self._device.synchronize()
            self._generator.attempt(partial(self._generation.begin, self.request))
            self._begun = True

    def logits(self, scale: int, previous_Bhw: Tokens | None) -> NDArray[np.float32]:
        self._begin()
        if previous_Bhw is not None:
            given = np.ascontiguousarray(previous_Bhw, np.int32)  # kept until the download below has waited
            self._device.write(self._generation.tokens_on_device(scale - 1), given)
        self._enqueue_scale(scale)
        h, w = self.request.schedule[scale]
        return self._generator.backend.download(self._generation.tensors.logits_of(h * w))

    def _force(self, tokens: Sequence[Tokens]) -> None:
        self._begin()
        prefill = self._generator.prefill_graph(self.request) if len(tokens) > 1 else None
        given = [np.ascontiguousarray(scale, np.int32) for scale in tokens]  # kept until the wait below
        for scale, array in enumerate(given):
            self._device.write(self._generation.tokens_on_device(scale), array)
        if prefill is not None:
            self._generator.attempt(partial(self._generation.prefill, prefill, given))
        else:
            for scale in range(len(given)):
                self._enqueue_scale(scale)
        self._device.synchronize()

    def _draw(self, scale: int) -> tuple[Tokens, ScaleTime]:
        started, generation = time.perf_counter(), self._generation
        self._begin()
        self._enqueue_scale(scale)
        generation.enqueue_draws(scale)
        drawn = generation.download_tokens(scale)
        tokens = drawn if self.request.given is None else self.request.given.put_back(scale, drawn)
        if tokens is not drawn:
            tokens = np.ascontiguousarray(tokens, np.int32)
            self._device.write(generation.tokens_on_device(scale), tokens)
            self._device.synchronize()
        return tokens, ScaleTime(self.request.schedule[scale], time.perf_counter() - started, 0.0)

    def finish(self, keep_decoded: bool) -> Finished:
        """Run what is left. If nothing has run and no tokens are given, the whole generation runs at once.

        Then the host waits once, at the end.
        """
        if not self.tokens and self.request.given is None:
            self._generator.require_open()
            return self._generator.attempt(partial(self._replay, keep_decoded))
        return super().finish(keep_decoded)

    def _replay(self, keep_decoded: bool) -> Finished:
        generation = self._generation
        generation.begin(self.request)
        mode, seconds = generation.replay()
        decoded = generation.decoded() if keep_decoded else None
        return Finished(generation.pixels, generation.tokens, decoded, (), 0.0, mode, seconds)

    def _enqueue_scale(self, scale: int) -> None:
        self._generator.attempt(partial(self._generation.enqueue_scale, scale))
