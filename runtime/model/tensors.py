"""Inputs and outputs of graphs: names, dtypes and axes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import require, require_file_name, require_match

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
NAME_FORM = "made of letters, digits and _ - ."
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output. An axis is a size, or a name if it is dynamic. Raises ArtifactRefused."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def __post_init__(self) -> None:
        require_match(NAME, "name", self.name, NAME_FORM)
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for axis in self.axes:
            ok = 0 < axis < 2**31 if isinstance(axis, int) else _AXIS.fullmatch(axis) is not None
            require(ok, "axes", self.axes, "positive sizes or identifiers")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the named axes. `height_x16` is 16 times `height`."""
        named = {axis: axis.partition("_x") for axis in self.axes if isinstance(axis, str)}
        lengths = {axis: sizes[base] * int(factor or 1) for axis, (base, _, factor) in named.items()}
        return tuple(axis if isinstance(axis, int) else lengths[axis] for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph: its file, and its inputs and outputs in order. Raises ArtifactRefused."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        require_file_name("file", self.file)
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        require(len(set(names)) == len(names), "tensors", names, "names that differ")


def host_dtype(dtype: str | np.dtype[Any]) -> np.dtype[Any]:
    """The NumPy type that stores a manifest dtype. bfloat16 is stored as its bits, in uint16."""
    return np.dtype(np.uint16) if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)
