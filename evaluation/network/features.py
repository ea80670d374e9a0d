"""Computes the features of images with a feature network in ONNX Runtime.

With the network of OpenAI's evaluator on a CPU, the features of an image do not depend on the other images, the size of
the batch, the number of threads or the process. The features of 40 images were equal in every bit in batches of 1, 2,
3, 5, 16, 32 and 40 on 1, 2, 3, 4 and 8 threads (ONNX Runtime 1.31, AVX-512). Another processor or another version may
round differently. ort-cuda was not measured.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.checks import invalid
from flexvar_runtime.errors import ArtifactRefused

from .contract import IMAGES, Head, NetworkFacts
from .network_file import FIX, NetworkFile, read_network
from .network_session import NetworkSession, open_session

BATCH = 32
"""Images in one run of the network. On two processors, 16 images a run are 12 % slower, and 64 are 5 % faster but take
twice the memory (0.9 GB with 32)."""


MOST_PIXELS = 2**24
"""Pixels in one run. Pictures of more than 724x724 pixels run in smaller batches, which bounds the memory."""


@dataclass(frozen=True)
class Features:
    """Features of N images. pool: float32 (N, D). spatial: float32 (N, S), or None if the network gives none."""

    pool: NDArray[np.float32]
    spatial: NDArray[np.float32] | None


class FeatureNetwork:
    """A feature network that is ready to run. Close it, or use it as a context manager.

    head: the layer from features to classes. facts: what the file says of the network.
    """

    def __init__(self, file: NetworkFile, session: NetworkSession) -> None:
        self.head: Head = file.head
        self.facts: NetworkFacts = file.facts
        self._digest = hashlib.sha256(file.content).hexdigest()[:16]
        self._file_name = file.path.name
        self._session: NetworkSession | None = session

    @classmethod
    def open(
        cls, path: Path, backend: str = "ort-cpu", device: str | None = None, threads: int | None = None
    ) -> FeatureNetwork:
        """Read and check the file, and open it.

        backend: "ort-cpu" or "ort-cuda". device: "cuda:N", for ort-cuda. threads: of ort-cpu; None takes as many as the
        process may use. Raises ArtifactRefused, InvalidInput, EnvironmentFailed and OutOfMemory.
        """
        file = read_network(path)
        return cls(file, open_session(file, backend, device, threads))

    @property
    def name(self) -> str:
        """The name of the network, such as "inception-2015"."""
        return self.facts.name

    @property
    def identity(self) -> str:
        """A text that is equal only for equal files: what the file says of the network, and the start of its sha256."""
        return f"{self.facts.identity}:{self._digest}"

    @property
    def size(self) -> int:
        """D, the number of features in `pool`."""
        return int(self.head.weights.shape[0])

    def features(self, images: NDArray[np.uint8]) -> Features:
        """The features of images. images: uint8 (N, H, W, 3), N at least 1, red green blue.

        The network runs on BATCH images at a time, and on the rest in a smaller batch. Raises InvalidInput, and
        ArtifactRefused if features are not finite.
        """
        if self._session is None:
            raise invalid("the network is closed", "open", "Open it again.")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise invalid(
                f"images has the type {images.dtype} and the shape {images.shape}",
                "uint8 of the shape (N, H, W, 3)",
                "Pass one or more images as such an array.",
            )
        batch = max(1, min(BATCH, MOST_PIXELS // (images.shape[1] * images.shape[2])))
        runs = [self._run(self._session, images[i : i + batch]) for i in range(0, len(images), batch)]
        pool, *spatial = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        return Features(pool, spatial[0] if spatial else None)

    def widths(self, size: tuple[int, int]) -> tuple[int, int]:
        """How many pool and spatial features an image of (height, width) has. The second is 0 if there are none."""
        features = self.features(np.zeros((1, *size, 3), np.uint8))
        return features.pool.shape[1], 0 if features.spatial is None else features.spatial.shape[1]

    def _run(self, session: NetworkSession, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The outputs of one run, checked."""
        outputs = session.run({IMAGES: np.ascontiguousarray(images)})
        if outputs[0].shape != (len(images), self.size) or any(
            output.ndim != 2 or len(output) != len(images) or not np.isfinite(output).all() for output in outputs
        ):
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise ArtifactRefused(
                f"{self._file_name} gives features of shape {shapes}, or features that are not finite.",
                expected=f"{self.size} finite features for every image",
                fix=FIX,
            )
        return outputs

    def close(self) -> None:
        """Free the session. Closing twice does no harm."""
        if self._session is not None:
            self._session.close()
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
