"""`import_network` writes a network that works, or nothing."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
from graphdef_file import FLOAT, constant_of, floats, tensor_of, tiny

from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.network.importing import import_network
from flexvar_runtime import ArtifactRefused, InvalidInput
from flexvar_runtime.errors import EnvironmentFailed


def test_import(tmp_path: Path) -> None:
    source, output = tiny(biases=True).write(tmp_path / "graph.pb"), tmp_path / "network.onnx"
    imported = import_network(source, output, force=False)
    assert imported.source_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert imported.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    assert (imported.pool, imported.spatial, imported.classes) == (20, 175, 10)
    assert imported.to_json() == imported.to_json() | {"file": str(output), "pool": 20, "spatial": 175}
    with FeatureNetwork.open(output, threads=1) as network:
        assert network.name == "inception-2015" and imported.source_sha256 in network.identity
        assert network.facts.operations_per_image == imported.operations_per_image
        assert network.head.weights.shape == (20, 10) and network.head.bias is None


def test_an_existing_file(tmp_path: Path) -> None:
    source, output = tiny().write(tmp_path / "graph.pb"), tmp_path / "network.onnx"
    output.write_bytes(b"mine")
    with pytest.raises(InvalidInput, match="--force"):
        import_network(source, output, force=False)
    assert output.read_bytes() == b"mine"
    import_network(source, output, force=True)
    assert output.read_bytes() != b"mine"


def test_a_network_that_does_not_work_leaves_no_file(tmp_path: Path) -> None:
    """Weights so large that features are infinite, and a graph that is none."""
    graph, output = tiny(), tmp_path / "network.onnx"
    large = constant_of("conv/batchnorm/beta", FLOAT, tensor_of(FLOAT, (8,), floats([3e38])))
    graph.replace(large)
    with pytest.raises(ArtifactRefused, match="finite"):
        import_network(graph.write(tmp_path / "graph.pb"), output, force=False)
    (tmp_path / "graph.pb").write_bytes(b"nothing")
    with pytest.raises(ArtifactRefused):
        import_network(tmp_path / "graph.pb", output, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["graph.pb"]


def test_onnx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnx"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("conversion", "onnx_writer", "operations"):
        monkeypatch.delitem(sys.modules, f"flexvar_evaluation.network.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(EnvironmentFailed, match=r"pip install 'flexvar-deploy\[evaluate\]'") as refusal:
        import_network(tiny().write(tmp_path / "graph.pb"), tmp_path / "network.onnx", force=False)
    assert refusal.value.exit_code == 4 and not (tmp_path / "network.onnx").exists()
