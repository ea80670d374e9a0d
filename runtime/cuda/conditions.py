"""Conditions of classes, remembered on the device: a slot a label, gathered into a row a sequence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from ..backends.base import Backend, Graph
from ..graphs import CONDITION
from ..manifest import ModelFacts
from .array import DeviceArray
from .device import Device

SLOTS = 64  # 0.4 MB each for d16


class ConditionStore:
    """modulation (slots, depth, 6, C), head_modulation (slots, 2, C) and first_input (slots, 1, C), float32.

    The graph always runs on `labels_per_run` labels, padded: a row does not depend on how many were asked for.
    """

    def __init__(self, backend: Backend, device: Device, model: ModelFacts, open_graph: Callable[[str], Graph]) -> None:
        self._backend, self._device, self._model, self._open = backend, device, model, open_graph
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._arrays: dict[str, DeviceArray] = {}
        self._capacity = 0

    def __getitem__(self, name: str) -> DeviceArray:
        return self._arrays[name]

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
        self._arrays.clear()
        self._capacity = 0

    def _grow(self, capacity: int) -> None:
        self.clear()
        for tensor in self._open(CONDITION).spec.outputs:
            row = tuple(axis for axis in tensor.axes if isinstance(axis, int))
            self._arrays[tensor.name] = self._backend.empty((capacity, *row), tensor.dtype)
        self._capacity = capacity

    def _compute(self, labels: list[int]) -> None:
        """Run the graph once and copy the rows; slots of the labels longest unused are taken over."""
        graph, per_run = self._open(CONDITION), self._backend.labels_per_run
        padded = np.full(per_run, self._model.null_class, np.int32)
        padded[: len(labels)] = labels
        outputs = {
            name: self._backend.empty((per_run, *array.shape[1:]), array.dtype) for name, array in self._arrays.items()
        }
        graph.run({"labels": self._backend.upload(padded)}, outputs)
        free = iter(set(range(self._capacity)) - set(self._slots.values()))
        for row, label in enumerate(labels):
            slot = next(free, None)
            slot = self._slots.popitem(last=False)[1] if slot is None else slot
            for name, array in self._arrays.items():
                self._device.copy(array[slot], outputs[name][row])
            self._slots[label] = slot
        self._device.synchronize()  # `outputs` are dropped
