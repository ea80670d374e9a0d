"""Conditions of classes, remembered on the device: a slot a label, gathered into a row a sequence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ..backends.base import Backend, Graph
from ..conditions import RowGroup, empty_buffers, tensors
from ..graphs import CONDITION
from ..manifest import ModelFacts
from . import kernels
from .array import DeviceArray
from .device import Device

SLOTS = 64  # 0.4 MB each for d16


class ConditionStore:
    """A buffer (len(names), slots, *row) float32 for each group of outputs of the condition graph.

    The graph always runs on `labels_per_run` labels, padded: a row does not depend on how many were asked for.
    """

    def __init__(
        self,
        backend: Backend,
        device: Device,
        model: ModelFacts,
        groups: tuple[RowGroup, ...],
        open_graph: Callable[[str], Graph],
    ) -> None:
        self._backend, self._device, self._model, self._open = backend, device, model, open_graph
        self._groups = groups
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._buffers: tuple[DeviceArray, ...] = ()
        self._capacity = 0

    def gather(self, slots: DeviceArray, targets: Sequence[DeviceArray]) -> None:
        """Enqueue the copies from `slots` (N,) int32 on the device into a buffer (len(names), N, *row) per group."""
        for buffer, target in zip(self._buffers, targets, strict=True):
            self._device.launch(kernels.gather_rows(buffer, slots, target))

    def slots(self, labels: Sequence[int]) -> list[int]:
        """The slot of every label, computed first where it is not there. Valid until the next call."""
        distinct = list(dict.fromkeys(labels))
        if len(distinct) > self._capacity:
            self._grow(max(SLOTS, len(distinct)))
        for label in distinct:
            if label in self._slots:
                self._slots.move_to_end(label)
        missing = [label for label in distinct if label not in self._slots]
        per_run = self._backend.labels_per_run
        for start in range(0, len(missing), per_run):
            self._compute(missing[start : start + per_run])
        return [self._slots[label] for label in labels]

    def clear(self) -> None:
        self._slots.clear()
        self._buffers = ()
        self._capacity = 0

    def _grow(self, capacity: int) -> None:
        self.clear()
        self._buffers = empty_buffers(self._groups, capacity, self._backend.empty)
        self._capacity = capacity

    def _compute(self, labels: list[int]) -> None:
        """Run the graph once and copy its rows; slots of the labels longest unused are taken over."""
        graph, per_run = self._open(CONDITION), self._backend.labels_per_run
        padded = np.full(per_run, self._model.null_class, np.int32)
        padded[: len(labels)] = labels
        computed = empty_buffers(self._groups, per_run, self._backend.empty)
        graph.run({"labels": self._backend.upload(padded)}, tensors(self._groups, computed))
        free = iter(set(range(self._capacity)) - set(self._slots.values()))
        taken: dict[int, int] = {}
        for label in labels:
            slot = next(free, None)
            taken[label] = self._slots.popitem(last=False)[1] if slot is None else slot
        slots = self._backend.upload(np.array(list(taken.values()), np.int32))
        for buffer, rows in zip(self._buffers, computed, strict=True):
            self._device.launch(kernels.scatter_rows(rows, slots, buffer))
        self._device.synchronize()  # `computed` and `slots` are dropped
        self._slots |= taken  # only now: a slot whose rows were never written must not be found again
