"""References, with which runs are compared. One file holds features, moments and radii of real images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.files.npz import NpzFile, open_npz
from flexvar_runtime.files.strict_json import decode, encode, loads

from .features import LoadedFeatures
from .network.contract import Head
from .statistics.frechet import frechet_distance
from .statistics.manifold import radii
from .statistics.moments import Moments

_FORMAT = 1
_FIX = "Pass a file that flexvar evaluate reference wrote."
_STORED = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The names of stored moments in the files of OpenAI's evaluator."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far stored moments are from those of the pictures in the same file.

    mean: largest absolute difference of the means. frechet: Fréchet distance between the two Gaussians.
    """

    mean: float
    frechet: float


@dataclass(frozen=True, kw_only=True)
class ReferenceFacts:
    """What a reference was made from.

    source: name of the file. sha256: of the file, or of the names, sizes and times of the files of a folder. network:
    identity of the feature network. stored: whether the moments are those that the file itself stores; `difference`
    and `spatial_difference` are then those to the moments of its pictures.
    """

    format: int
    source: str
    sha256: str
    images: int
    height: int
    width: int
    network: str
    network_name: str
    stored: bool
    difference: Difference | None
    spatial_difference: Difference | None


@dataclass(frozen=True)
class Reference:
    """pool: (R, D) float32. radii_half, radii_float32: (R,) float32. head: weights of the classes, None if there are
    none."""

    facts: ReferenceFacts
    pool: NDArray[np.float32]
    radii_half: NDArray[np.float32]
    radii_float32: NDArray[np.float32]
    moments: Moments
    spatial: Moments | None
    head: Head | None


def make_reference(
    features: LoadedFeatures,
    stored: tuple[Moments | None, Moments | None],
    head: Head | None,
    *,
    source: str,
    sha256: str,
    size: tuple[int, int],
    network_name: str,
) -> Reference:
    """A reference from features of pictures. stored: the moments that the file itself stores, pool and spatial."""
    own, spatial = stored
    facts = ReferenceFacts(
        format=_FORMAT,
        source=source,
        sha256=sha256,
        images=len(features.pool),
        height=size[0],
        width=size[1],
        network=features.network,
        network_name=network_name,
        stored=own is not None,
        difference=_difference(own, features.moments),
        spatial_difference=_difference(spatial, features.spatial),
    )
    return Reference(
        facts,
        features.pool,
        radii(features.pool, "half"),
        radii(features.pool, "float32"),
        features.moments if own is None else own,
        features.spatial if spatial is None else spatial,
        head,
    )


def _difference(stored: Moments | None, computed: Moments | None) -> Difference | None:
    if stored is None or computed is None:
        return None
    largest = float(np.abs(stored.mean - computed.mean).max())
    return Difference(mean=largest, frechet=frechet_distance(stored, computed))


def stored_moments(path: Path, widths: tuple[int, int]) -> tuple[Moments | None, Moments | None]:
    """The moments that an `.npz` file of OpenAI's evaluator stores for FID and sFID; None if it stores none.

    widths: numbers of pool and spatial features. Raises ArtifactRefused if the file stores others.
    """
    fix = "Pass a file of OpenAI's evaluator that belongs to this network."
    with open_npz(path, str(path), expected="moments", fix=fix, packed=True) as file:
        pool, spatial = (_moments(file, names, width) for names, width in zip(_STORED.values(), widths, strict=True))
    return pool, spatial


def _moments(file: NpzFile, names: tuple[str, str], width: int) -> Moments | None:
    found = [file.infos.get(name) for name in names]
    if found == [None, None] or not width:
        return None
    for name, info, shape in zip(names, found, ((width,), (width, width)), strict=True):
        if info is None or info.shape != shape or not info.dtype.startswith("float"):
            raise ValueError(f"its array {name} is {info or 'missing'}, but it must be float64 {shape}")
    mean, covariance = (file.read(name).astype(np.float64) for name in names)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"its arrays {names[0]} and {names[1]} have values that are not finite")
    return Moments(mean, covariance, 0)


def write_reference(path: Path, reference: Reference, *, force: bool = False) -> None:
    """Write a reference atomically. Raises InvalidInput if the file exists, unless `force`."""
    text = json.dumps(encode(reference.facts), sort_keys=True).encode()
    arrays: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(text, np.uint8),
        "pool": reference.pool,
        "radii_half": reference.radii_half,
        "radii_float32": reference.radii_float32,
        "mean": reference.moments.mean,
        "covariance": reference.moments.covariance,
    }
    if reference.spatial is not None:
        arrays |= {"spatial_mean": reference.spatial.mean, "spatial_covariance": reference.spatial.covariance}
    if reference.head is not None:
        arrays["head_weights"] = reference.head.weights
        if reference.head.bias is not None:
            arrays["head_bias"] = reference.head.bias
    with atomic_write(path, force=force) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # typed as if a name could be that of an option


def read_reference(path: Path) -> Reference:
    """Read a reference. Raises ArtifactRefused."""
    with open_npz(path, str(path), expected="a reference", fix=_FIX) as file:
        if "about" not in file.infos:
            got = f"{path} is not a reference."
            raise ArtifactRefused(got, expected="a reference", fix=_FIX)
        data = loads(file.read("about").tobytes(), where=str(path), fix=_FIX)
        facts = decode(ReferenceFacts, data, where=str(path), fix=_FIX)
        if facts.format != _FORMAT:
            raise ValueError(f"its format is {facts.format}, not {_FORMAT}")
        images, width = facts.images, file.infos["pool"].shape[-1]
        spatial = head = None
        if "spatial_mean" in file.infos:
            spatial = _read_moments(file, "spatial_", file.infos["spatial_mean"].shape[-1], images)
        if "head_weights" in file.infos:
            classes = file.infos["head_weights"].shape[-1]
            bias = _read(file, "head_bias", "float32", (classes,)) if "head_bias" in file.infos else None
            head = Head(_read(file, "head_weights", "float32", (width, classes)), bias)
        return Reference(
            facts,
            _read(file, "pool", "float32", (images, width)),
            _read_radii(file, "radii_half", images),
            _read_radii(file, "radii_float32", images),
            _read_moments(file, "", width, images),
            spatial,
            head,
        )


def _read_moments(file: NpzFile, prefix: str, width: int, images: int) -> Moments:
    mean = _read(file, f"{prefix}mean", "float64", (width,))
    return Moments(mean, _covariance(file, f"{prefix}covariance", width), images)


def _covariance(file: NpzFile, name: str, width: int) -> NDArray[np.float64]:
    """A symmetric matrix whose variances are not negative. Raises ValueError."""
    matrix = _read(file, name, "float64", (width, width))
    if (matrix.diagonal() < 0).any() or not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9):
        raise ValueError(f"its array {name} is no covariance matrix")
    return matrix


def _read_radii(file: NpzFile, name: str, images: int) -> NDArray[np.float32]:
    radii = _read(file, name, "float32", (images,))
    if (radii < 0).any():
        raise ValueError(f"its array {name} has negative values")
    return radii


def _read(file: NpzFile, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of finite values. Raises ValueError if it has another type or shape."""
    info = file.infos.get(name)
    if info is None or (info.dtype, info.shape) != (dtype, shape):
        raise ValueError(f"its array {name} is {info or 'missing'}, but it must be {dtype} {shape}")
    array = file.read(name)
    if not np.isfinite(array).all():
        raise ValueError(f"its array {name} has values that are not finite")
    return array
