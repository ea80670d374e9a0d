"""Networks and references that the tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A feature network of random weights. Read-only."""
    pytest.importorskip("onnx")
    from tiny_network import write_tiny_network

    return write_tiny_network(tmp_path_factory.mktemp("network") / "tiny.onnx")
