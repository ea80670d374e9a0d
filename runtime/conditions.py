"""What the class of an image decides: the modulation of every block and of the head, and the first input.

The condition graph gives it as many tensors, a row for each label. Tensors with rows of one shape share a buffer here,
so that the rows of a label are copied at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Array
from .errors import ArtifactRefused
from .manifest import GraphSpec

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class RowGroup:
    """Outputs of the condition graph whose rows have one shape; a buffer of them is (len(names), labels, *row)."""

    names: tuple[str, ...]
    row: tuple[int, ...]


def row_groups(condition: GraphSpec) -> tuple[RowGroup, ...]:
    """The outputs of a condition graph, grouped by the shape of a row, in the declared order.

    Raises ArtifactRefused for an output that is not float32 with a row for each label.
    """
    names: dict[tuple[int, ...], list[str]] = {}
    for tensor in condition.outputs:
        row = tuple(axis for axis in tensor.axes[1:] if isinstance(axis, int))
        if tensor.dtype != "float32" or tensor.axes != ("labels", *row):
            raise ArtifactRefused(
                f"{tensor.name} {tensor.dtype} {tensor.axes} of the condition graph",
                expected="float32 with a row for each label",
                fix="export the bundle again",
            )
        names.setdefault(row, []).append(tensor.name)
    return tuple(RowGroup(tuple(found), row) for row, found in names.items())


def empty_buffers(
    groups: Sequence[RowGroup], rows: int, empty: Callable[[tuple[int, ...], str], Array]
) -> tuple[Array, ...]:
    """A buffer (len(names), rows, *row) float32 for each group, allocated with `empty`."""
    return tuple(empty((len(group.names), rows, *group.row), "float32") for group in groups)


def tensors(groups: Sequence[RowGroup], buffers: Sequence[Array]) -> dict[str, Array]:
    """Every output of the condition graph by name, (rows, *row): views of the groups' buffers."""
    return {
        name: buffer[i] for group, buffer in zip(groups, buffers, strict=True) for i, name in enumerate(group.names)
    }


@dataclass(frozen=True)
class Condition:
    """The condition of some sequences on the host: a buffer (len(names), N, *row) float32 for each group."""

    groups: tuple[RowGroup, ...]
    buffers: tuple[Float32, ...]

    @classmethod
    def compute(
        cls,
        groups: tuple[RowGroup, ...],
        rows: int,
        empty: Callable[[tuple[int, ...], str], Array],
        run: Callable[[Mapping[str, Array]], None],
        download: Callable[[Array], NDArray[Any]],
    ) -> Condition:
        """The condition of `rows` labels: outputs allocated with `empty`, filled by `run`, then downloaded."""
        buffers = empty_buffers(groups, rows, empty)
        run(tensors(groups, buffers))
        return cls(groups, tuple(download(buffer) for buffer in buffers))

    def row(self, index: int) -> Condition:
        """A copy of the condition of one sequence."""
        return Condition(self.groups, tuple(buffer[:, index : index + 1].copy() for buffer in self.buffers))

    @classmethod
    def stack(cls, conditions: Sequence[Condition]) -> Condition:
        """The condition of all sequences of `conditions`, in their order. There must be at least one."""
        joined = zip(*(condition.buffers for condition in conditions), strict=True)
        return cls(conditions[0].groups, tuple(np.concatenate(buffers, axis=1) for buffers in joined))

    def tensors(self) -> dict[str, Float32]:
        """Every output of the condition graph by name, (N, *row): views."""
        return tensors(self.groups, self.buffers)
