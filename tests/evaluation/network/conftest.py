"""The recorded network, written and converted once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from graphdef_file import inception
from numpy.typing import NDArray

from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.network.graphdef import Graph, read_graph
from flexvar_evaluation.network.network_file import check_network
from flexvar_evaluation.network.network_session import open_session


@pytest.fixture(scope="session")
def record(golden: Path) -> dict[str, NDArray[np.float64]]:
    """What OpenAI's evaluator computed with the recorded network."""
    with np.load(golden / "openai_evaluator.npz") as stored:
        return {name: stored[name].astype(np.float64) for name in stored.files if stored[name].dtype.kind == "f"}


@pytest.fixture(scope="session")
def recorded_graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The GraphDef of the recorded network, but with random biases of the classes, which must not matter."""
    return read_graph(inception(biases=True).write(tmp_path_factory.mktemp("graph") / "network.pb"))


@pytest.fixture(scope="session")
def converted(recorded_graph: Graph) -> bytes:
    """The ONNX file of the recorded network."""
    from flexvar_evaluation.network.conversion import convert  # it needs onnx

    return convert(recorded_graph)


@pytest.fixture(scope="session")
def opened() -> Callable[..., FeatureNetwork]:
    """(bytes of an ONNX file, threads) -> the network."""

    def network(content: bytes, threads: int = 1) -> FeatureNetwork:
        file = check_network(content, Path("network.onnx"))
        return FeatureNetwork(file, open_session(file, "ort-cpu", None, threads))

    return network


@pytest.fixture(scope="session")
def recorded_network(converted: bytes, opened: Callable[..., FeatureNetwork]) -> Iterator[FeatureNetwork]:
    """The recorded network on one thread."""
    with opened(converted) as network:
        yield network
