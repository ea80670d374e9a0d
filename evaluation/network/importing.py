"""Import of the network of OpenAI's evaluator: from its TensorFlow file to the ONNX file of a feature network."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexvar_runtime.errors import EnvironmentFailed
from flexvar_runtime.files.atomic import atomic_write

from .features import FeatureNetwork
from .graphdef import Graph, read_graph
from .network_file import check_network
from .network_session import open_session

_TRIED_SIDE = 32  # pixels of the image that the network is tried on


@dataclass(frozen=True)
class ImportedNetwork:
    """What was imported.

    file: the ONNX file. source_sha256: of the file that it was made from. sha256: of the ONNX file, which depends on
    the version of onnx. pool, spatial: numbers of features of an image; spatial is None if the network has none.
    classes: of the head. operations_per_image: additions and multiplications in convolutions, None if unknown.
    """

    file: Path
    source_sha256: str
    sha256: str
    pool: int
    spatial: int | None
    classes: int
    operations_per_image: int | None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"file": str(self.file)}


def import_network(source: Path, output: Path, *, force: bool) -> ImportedNetwork:
    """Convert a frozen TensorFlow graph, try the result on one image, and write it.

    source: the file classify_image_graph_def.pb. output: the ONNX file to write, which appears only if all went well.
    force: whether an existing file may be replaced. Raises InvalidInput, ArtifactRefused, EnvironmentFailed and
    OutOfMemory.
    """
    with atomic_write(output, force=force) as partial:
        content = _convert(read_graph(source))
        file = check_network(content, output)
        image = np.random.default_rng(0).integers(0, 256, (1, _TRIED_SIDE, _TRIED_SIDE, 3), np.uint8)
        with FeatureNetwork(file, open_session(file, "ort-cpu", None, None)) as network:
            tried = network.features(image)
        partial.write_bytes(content)
    return ImportedNetwork(
        file=output,
        source_sha256=file.facts.source_sha256,
        sha256=hashlib.sha256(content).hexdigest(),
        pool=tried.pool.shape[1],
        spatial=None if tried.spatial is None else tried.spatial.shape[1],
        classes=file.head.weights.shape[1],
        operations_per_image=file.facts.operations_per_image,
    )


def _convert(graph: Graph) -> bytes:
    """The ONNX file. Raises EnvironmentFailed if onnx is not installed."""
    try:
        from .conversion import convert
    except ImportError as error:
        raise EnvironmentFailed(
            f"Importing a network needs the module {error.name}, which is not installed.",
            expected="the extra evaluate",
            fix="Run: pip install 'flexvar-deploy[evaluate]'",
        ) from error
    return convert(graph)
