"""The record of OpenAI's evaluator, and the features that it was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_features import pool_like


@pytest.fixture(scope="session")
def record(golden: Path) -> dict[str, Any]:
    """The figures of `reference` and `samples`, as OpenAI's evaluator computed them."""
    with np.load(golden / "openai_evaluator.npz") as file:
        return {name: file[name] for name in ("is", "is_4000", "fid", "fid_singular", "pr", "pr32", "pr32_big")}


@pytest.fixture(scope="session")
def reference() -> NDArray[np.float32]:
    """(6000, 2048) float32. Read-only."""
    return read_only(pool_like(6000, 1))


@pytest.fixture(scope="session")
def samples() -> NDArray[np.float32]:
    """(6000, 2048) float32, of another distribution. Read-only."""
    return read_only(pool_like(6000, 2, 0.3))


def read_only(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array.flags.writeable = False
    return array
