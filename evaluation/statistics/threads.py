"""How many threads compute the metrics, so that a metric has the same bits however many processors there are.

OpenBLAS cuts its work by the number of its threads, which changes the last bits of eigenvectors and of products. So
all metrics are computed with one thread of OpenBLAS. Where the work is long, it is cut into tiles of a fixed size, and
several tiles are computed at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from flexvar_runtime.machine.processors import default_threads

MOST_TILES = 8
"""Tiles computed at the same time. Each takes about 120 MB."""


@contextmanager
def fixed_threads() -> Iterator[None]:
    """Let NumPy's linear algebra use one thread. This holds for the whole process until the end of the body."""
    with _controller().limit(limits=1, user_api="blas"):
        yield


def tiles_at_once() -> int:
    """How many tiles to compute at the same time: one on each processor that this process may use, up to 8."""
    return min(default_threads(), MOST_TILES)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # it searches the loaded libraries, for milliseconds
