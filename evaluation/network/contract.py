"""What the ONNX file of a feature network holds, whoever wrote it.

| part | name | type and shape |
|---|---|---|
| input | images | uint8 (N, H, W, 3), red green blue, of any N, H and W |
| output | pool | float32 (N, D): the features of an image |
| output, optional | spatial | float32 (N, S): features that keep where something is in the image |
| initializer | head_weights | float32 (D, K), stored as raw bytes |
| initializer, optional | head_bias | float32 (K,), stored as raw bytes |

No node uses the head. The probabilities of the K classes are softmax(pool @ head_weights + head_bias), and are computed
from stored features. Everything is in one file. The metadata has the entries of `NetworkFacts`, and
`flexvar_network` with the version of this contract.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import require, require_match

IMAGES, POOL, SPATIAL = "images", "pool", "spatial"
HEAD_WEIGHTS, HEAD_BIAS = "head_weights", "head_bias"
VERSION_KEY, VERSION = "flexvar_network", "1"
_NAME, _SOURCE, _CONVERSION, _OPERATIONS = "name", "source_sha256", "conversion", "operations_per_image"
_FLOAT = 1  # element type of the ONNX format
_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHOLE = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class Head:
    """The layer that follows the features. weights: float32 (D, K). bias: float32 (K,), or None if it has none."""

    weights: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """What the metadata of a network's file says.

    name: of the network, such as "inception-2015". source_sha256: of the file that it was made from. conversion: name
    and version of the program that made it, such as "openai-1". The version changes whenever features change.
    operations_per_image: additions and multiplications, two for each product of a convolution; None if unknown.
    """

    name: str
    source_sha256: str
    conversion: str
    operations_per_image: int | None = None

    def __post_init__(self) -> None:
        """Raises ArtifactRefused."""
        plain = "1 to 64 letters, digits and . _ -"
        require_match(_NAMES, _NAME, self.name, plain)
        require_match(_SHA256, _SOURCE, self.source_sha256, "64 hexadecimal digits")
        require_match(_NAMES, _CONVERSION, self.conversion, plain)
        require(self.operations_per_image is None or self.operations_per_image > 0, _OPERATIONS, "0", "positive")

    @property
    def identity(self) -> str:
        """A text that is equal for networks that give equal features, whichever version of a library wrote the file."""
        return f"{self.name}:{self.conversion}:{self.source_sha256}"

    def entries(self) -> dict[str, str]:
        """The entries of the metadata."""
        entries = {_NAME: self.name, _SOURCE: self.source_sha256, _CONVERSION: self.conversion}
        if self.operations_per_image is not None:
            entries[_OPERATIONS] = str(self.operations_per_image)
        return {VERSION_KEY: VERSION} | entries

    @staticmethod
    def from_entries(entries: Mapping[str, str]) -> NetworkFacts:
        """Read the entries of the metadata. Unknown entries are ignored. Raises ArtifactRefused."""
        version = entries.get(VERSION_KEY, "")
        require(version == VERSION, VERSION_KEY, version, f"{VERSION} in the metadata of a feature network")
        operations = entries.get(_OPERATIONS)
        if operations is not None:
            require_match(_WHOLE, _OPERATIONS, operations, "a positive whole number")
        return NetworkFacts(
            name=entries.get(_NAME, ""),
            source_sha256=entries.get(_SOURCE, ""),
            conversion=entries.get(_CONVERSION, ""),
            operations_per_image=None if operations is None else int(operations),
        )


def complete_model(model: Any, facts: NetworkFacts, head: Head) -> None:
    """Add the metadata and the head to a model whose graph has the input and outputs of the contract.

    model: an onnx.ModelProto, which is changed.
    """
    for key, value in facts.entries().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    for name, array in ((HEAD_WEIGHTS, head.weights), (HEAD_BIAS, head.bias)):
        if array is not None:
            tensor = model.graph.initializer.add()
            tensor.name, tensor.data_type = name, _FLOAT
            tensor.dims.extend(array.shape)
            tensor.raw_data = np.ascontiguousarray(array, "<f4").tobytes()
