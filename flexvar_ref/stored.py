"""Tensors in a file that are described, but not yet read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .pickles import Opaque


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A dense tensor in a file.

    dtype: None for a type that torch lacks or that no weight has. read: returns the tensor, which may share the memory
    of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes. 0 if the type is unknown."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype is not None else 0)


Stored = StoredTensor | Opaque
"""A tensor, or a value of another class under the name of one."""
State = Mapping[str, Stored]
