"""The condition of a class: the modulation of every block and of the head, and the first input.

The condition graph returns it as several tensors, each with a row for each label. Tensors whose rows have one shape
share a buffer here, so that the rows of a label are copied at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from ..backends.base import Array, Backend, Graph
from ..checks import require
from ..model.tensors import GraphSpec

MOST_GROWTH = 4  # with more than this many times the slots that a request needs, slots are given back


@dataclass(frozen=True)
class RowGroup:
    """Outputs of the condition graph whose rows have one shape. Their buffer is (len(names), labels, *row)."""

    names: tuple[str, ...]
    row: tuple[int, ...]


def row_groups(condition: GraphSpec) -> tuple[RowGroup, ...]:
    """The outputs of a condition graph, grouped by the shape of a row, in the declared order.

    Raises ArtifactRefused for an output that is not float32 with a row for each label.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for tensor in condition.outputs:
        row = tuple(axis for axis in tensor.axes[1:] if isinstance(axis, int))
        found = f"{tensor.dtype} {tensor.axes}"
        fits = tensor.dtype == "float32" and tensor.axes == ("labels", *row)
        require(fits, f"The output {tensor.name} of the condition graph", found, "float32 with a row for each label")
        names.setdefault(row, []).append(tensor.name)
    return tuple(RowGroup(tuple(found), row) for row, found in names.items())


def empty_buffers(
    groups: Sequence[RowGroup], rows: int, empty: Callable[[tuple[int, ...], str], Array]
) -> tuple[Array, ...]:
    """A buffer (len(names), rows, *row) float32 for each group, allocated with `empty`."""
    return tuple(empty((len(group.names), rows, *group.row), "float32") for group in groups)


def tensors(groups: Sequence[RowGroup], buffers: Sequence[Array]) -> dict[str, Array]:
    """Every output of the condition graph by name, (rows, *row): views of the buffers of the groups."""
    return {
        name: buffer[i] for group, buffer in zip(groups, buffers, strict=True) for i, name in enumerate(group.names)
    }


class ConditionCache(ABC):
    """The conditions of the classes that were used last, one slot for each class.

    The condition graph always runs on `labels_per_run` labels, padded with "no class", so that the row of a label does
    not depend on the other labels. `clear` frees the buffers.
    """

    def __init__(
        self,
        backend: Backend,
        spec: GraphSpec,
        null_class: int,
        slots: int,
        open_graph: Callable[[], AbstractContextManager[Graph]],
    ) -> None:
        """slots: classes that are kept. A request with more classes gets more slots. If there are more than
        MOST_GROWTH times as many as a later request needs, it gives them back. All classes are forgotten whenever the
        number changes."""
        self.groups = row_groups(spec)
        self._backend, self._null_class, self._least, self._open = backend, null_class, slots, open_graph
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._capacity = 0
        self._buffers: tuple[Array, ...] = ()

    @abstractmethod
    def gather(self, slots: Array, targets: Sequence[Array]) -> None:
        """Copy the rows in `slots` (N,) int32 into a buffer (len(names), N, *row) for each group."""

    @abstractmethod
    def _scatter(self, computed: Sequence[Array], slots: Array) -> None:
        """Copy the first rows of a buffer for each group into `slots` (R,) int32. Waits for the copies."""

    def rows(self, labels: Sequence[int]) -> dict[str, Array]:
        """Every output of the condition graph by name, with a row for each label, in new buffers."""
        buffers = empty_buffers(self.groups, len(labels), self._backend.empty)
        self.gather(self._backend.upload(np.array(self.slots(labels), np.int32)), buffers)
        return tensors(self.groups, buffers)

    def slots(self, labels: Sequence[int]) -> list[int]:
        """The slot of every label. Missing ones are computed first. Valid until the next call."""
        distinct = list(dict.fromkeys(labels))
        capacity = max(self._least, len(distinct))
        if capacity > self._capacity or self._capacity > MOST_GROWTH * capacity:
            self.clear()
            self._buffers = empty_buffers(self.groups, capacity, self._backend.empty)
            self._capacity = capacity  # only now: the allocation may fail
        for label in distinct:
            if label in self._slots:
                self._slots.move_to_end(label)
        missing = [label for label in distinct if label not in self._slots]
        if missing:
            per_run = self._backend.labels_per_run
            with self._open() as graph:
                for start in range(0, len(missing), per_run):
                    self._compute(graph, missing[start : start + per_run])
        return [self._slots[label] for label in labels]

    def clear(self) -> None:
        """Forget all classes."""
        self._slots.clear()
        self._buffers = ()
        self._capacity = 0

    def _compute(self, graph: Graph, labels: list[int]) -> None:
        """Run the graph once and copy its rows. Free slots are taken first, then those of the classes unused
        longest."""
        padded = np.full(self._backend.labels_per_run, self._null_class, np.int32)
        padded[: len(labels)] = labels
        computed = empty_buffers(self.groups, len(padded), self._backend.empty)
        graph.run({"labels": self._backend.upload(padded)}, tensors(self.groups, computed))
        free = iter(set(range(self._capacity)) - set(self._slots.values()))
        taken: dict[int, int] = {}
        for label in labels:
            slot = next(free, None)
            taken[label] = self._slots.popitem(last=False)[1] if slot is None else slot
        self._scatter(computed, self._backend.upload(np.array(list(taken.values()), np.int32)))
        self._slots |= taken  # only now: a slot whose rows were never written must not be found
