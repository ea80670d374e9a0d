"""Makes a skeleton of a bundle, which leaves out random weights, and makes the same bundle from it again.

The skeleton of d16 takes 7 MiB, its bundle 780 MiB. `random_model` makes the weights again, so they need not travel. A
skeleton is a folder:

    bundle/        the bundle's graphs, its manifest and its tables
    weights.json   for every file of weights: the place and a checksum of each of its tensors
    weights.bin    the tensors that do travel, one after the other

Tensors that are computed at export travel, because another processor may round them differently. These are the tensors
of the names below, and all small ones. Tensors that are not in the module of their graph travel, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexvar_export.bundle import TORCH_PRECISIONS
from flexvar_export.bundle_writer import write_bundle
from flexvar_export.modules import graph_module
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime.bundle.manifest import MANIFEST, Manifest
from flexvar_runtime.errors import ArtifactRefused

SMALL_BYTES = 64 * 1024
COMPUTED = frozenset({"offset", "mean", "start", "temperature"})  # last part of the name
BUNDLE, INDEX, CARRIED = "bundle", "weights.json", "weights.bin"
DATA_SUFFIX = ".data"
WORKERS = 4  # files made at a time, because each needs its weights twice in memory
Model = tuple[FlexVAR, Tokenizer]


@dataclass(frozen=True)
class Piece:
    """A tensor in a file of weights. carried: its offset among the tensors that travel, None for one that does not."""

    name: str
    offset: int
    length: int
    crc32: int
    carried: int | None


def make_skeleton(bundle: Path, model: Model, folder: Path) -> None:
    """Write `folder`, which must not exist. model: the one that the bundle was exported from."""
    manifest = Manifest.from_bytes((bundle / MANIFEST).read_bytes())
    folder.mkdir(parents=True)
    weights = {f"{spec.file}{DATA_SUFFIX}" for spec in manifest.graphs.values()}
    shutil.copytree(bundle, folder / BUNDLE, ignore=lambda _, names: weights & set(names))
    index, carried = dict[str, Any](), bytearray()
    for graph, spec in manifest.graphs.items():
        file = f"{spec.file}{DATA_SUFFIX}"
        if file not in manifest.files:  # the graph has no weights, or shares another's
            continue
        state, pieces = _state(manifest, graph, model), list[Piece]()
        with (bundle / file).open("rb") as source:
            for name, offset, length in _external(bundle / spec.file):
                source.seek(offset)
                raw, place = source.read(length), None
                small = length <= SMALL_BYTES or name.rpartition(".")[2] in COMPUTED
                if small or name not in state or _bytes(state[name]) != raw:
                    place = len(carried)
                    carried += raw
                pieces.append(Piece(name, offset, length, zlib.crc32(raw), place))
        size = (bundle / file).stat().st_size
        index[file] = {"graph": graph, "size": size, "tensors": list(map(astuple, pieces))}
    (folder / CARRIED).write_bytes(carried)
    (folder / INDEX).write_text(json.dumps(index, separators=(",", ":")))


def regenerate(skeleton: Path, model: Model, bundle: Path) -> dict[str, Any]:
    """Write `bundle` from a skeleton. Returns how many files were made.

    Raises ArtifactRefused where a file has another sha256 than in the manifest, naming the tensors that differ. Then
    nothing is written.
    """
    index, carried = _read(skeleton)
    with write_bundle(bundle) as directory:
        shutil.copytree(skeleton / BUNDLE, directory, dirs_exist_ok=True)
        manifest = Manifest.from_bytes((directory / MANIFEST).read_bytes())

        def make(file: str) -> list[str]:
            entry = index[file]
            state = _state(manifest, entry["graph"], model)
            data, different = bytearray(entry["size"]), []
            for piece in (Piece(*values) for values in entry["tensors"]):
                raw = _raw(piece, state, carried)
                if len(raw) != piece.length or zlib.crc32(raw) != piece.crc32:
                    different.append(f"{file}: {piece.name}")
                data[piece.offset : piece.offset + piece.length] = raw[: piece.length]
            (directory / file).write_bytes(data)
            return different

        with ThreadPoolExecutor(WORKERS) as pool:
            different = [name for names in pool.map(make, index) for name in names]
        _check(directory, manifest, different)
    return {"files": len(manifest.files), "made": len(index), "sha256_equal": True}


def _check(directory: Path, manifest: Manifest, different: list[str]) -> None:
    def wrong(file: str) -> bool:
        path = directory / file
        if not path.is_file():
            return True
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() != manifest.files[file].sha256

    with ThreadPoolExecutor(WORKERS) as pool:
        bad = [file for file, is_wrong in zip(manifest.files, pool.map(wrong, manifest.files), strict=True) if is_wrong]
    if bad:
        tensors = f" Tensors that differ: {', '.join(different[:8])}." if different else ""
        raise ArtifactRefused(
            f"{', '.join(bad)} has another sha256 than the skeleton's manifest says.{tensors}",
            expected="the files that were exported",
            fix="Make the skeleton again with these sources, or export the model on this machine.",
        )


def _read(skeleton: Path) -> tuple[dict[str, Any], memoryview]:
    try:
        index: dict[str, Any] = json.loads((skeleton / INDEX).read_text())
        return index, memoryview((skeleton / CARRIED).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactRefused(
            f"{skeleton} is not a skeleton ({error}).",
            expected="a skeleton",
            fix="Make one with gpu_check.py --pack DIR",
        ) from error


def _external(graph: Path) -> list[tuple[str, int, int]]:
    """Name, offset and length of the tensors whose values lie in the graph's own file of weights."""
    found = []
    for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == f"{graph.name}{DATA_SUFFIX}":
            found.append((tensor.name, int(place.get("offset", 0)), int(place["length"])))
    return found


def _state(manifest: Manifest, graph: str, model: Model) -> dict[str, Tensor]:
    dtype = TORCH_PRECISIONS[manifest.precision]
    return graph_module(graph, *model, dtype, decoder=manifest.decoder).state_dict()


def _raw(piece: Piece, state: dict[str, Tensor], carried: memoryview) -> memoryview | bytes:
    if piece.carried is not None:
        return carried[piece.carried : piece.carried + piece.length]
    return _bytes(state[piece.name]) if piece.name in state else b""


def _bytes(tensor: Tensor) -> memoryview:
    array: NDArray[np.uint8] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array.data
