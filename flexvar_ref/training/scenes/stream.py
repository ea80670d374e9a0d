"""Random streams that are the same on every machine and with every version of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Floats = NDArray[np.float64]


class Stream:
    """Draws of the counter-based generator Philox with the key (seed, index). Each label has its own stream.

    Only raw words of the generator are used, because numpy guarantees these but not its distributions.
    """

    def __init__(self, seed: int, index: int, label: int) -> None:
        key, counter = np.array([seed, index], np.uint64), np.array([0, 0, 0, label], np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)

    def uniform(self, *shape: int) -> Floats:
        """Float64 of `shape` in [0, 1)."""
        words: NDArray[np.uint64] = self._bits.random_raw(int(np.prod(shape)))
        return (words >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """A float from `low` to below `high`."""
        return low + (high - low) * (self._bits.random_raw() >> 11) * 2.0**-53

    def whole(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both inclusive."""
        return low + min(high - low, int(self.between(0, high - low + 1)))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.between(0, 1) < probability

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, drawn uniformly."""
        return options[self.whole(0, len(options) - 1)]

    def side(self) -> float:
        """−1 (left) or 1 (right), with equal probability."""
        return -1.0 if self.chance(0.5) else 1.0
