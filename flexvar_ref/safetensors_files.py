"""Reading of safetensors: one file, the index of a sharded checkpoint, or the folder that holds either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import CheckpointError
from .parsing import read_json, refuse_failures, shown
from .stored import State, StoredTensor

SUFFIX, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
MAX_HEADER_BYTES = 8 << 20  # a header of a published model has 60 kB
MAX_INDEX_BYTES = 8 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Content:
    """Named tensors of a checkpoint, and the metadata of its header (empty for an index)."""

    state: State
    metadata: Mapping[str, str]


def find_file(path: Path) -> Path:
    """The file to read for a path: the path, or for a folder the index or the only safetensors file in it.

    Raises CheckpointError for a folder without such a file, or with several.
    """
    if not os.path.isdir(path):
        return path
    names = sorted(entry.name for entry in path.iterdir())
    found = [name for name in names if name.endswith(INDEX_SUFFIX)] or [n for n in names if n.endswith(SUFFIX)]
    if len(found) == 1:
        return path / found[0]
    several = f"several checkpoints: {', '.join(map(shown, found[:8]))}"
    raise CheckpointError(
        f"{path} is a folder with {several if found else 'neither a safetensors file nor an index'}.",
        expected=f"a folder with one *{INDEX_SUFFIX} or one *{SUFFIX}",
        fix=f"Pass one of its files, such as {path / found[0]}." if found else "Pass the file of the checkpoint.",
    )


def list_files(path: Path) -> list[Path]:
    """Every file that `path` consists of, in order. Raises CheckpointError."""
    path = find_file(path)
    if not path.name.endswith(".json"):
        return [path]
    return [path, *(path.parent / name for name in sorted(set(_read_index(path).values())))]


def read_safetensors(path: Path) -> Content:
    """The tensors of a file or, if its name ends in .json, of the shards that it lists. Raises CheckpointError."""
    if not path.name.endswith(".json"):
        return _read_file(path)
    state: dict[str, StoredTensor] = {}
    weight_map = _read_index(path)
    shards = {name: _read_file(path.parent / name).state for name in sorted(set(weight_map.values()))}
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        raise CheckpointError(
            f"{path.name} lists {shown(absent[0])} in {weight_map[absent[0]]}, which does not hold it.",
            expected="shards that hold what the index lists",
            fix="Download the index and all its shards again.",
        )
    return Content({**state, **{name: shards[shard][name] for name, shard in weight_map.items()}}, {})


def _read_file(path: Path) -> Content:
    with refuse_failures(
        CheckpointError,
        f"{path.name} cannot be read",
        expected="a complete safetensors file",
        fix="Download it again and compare its size.",
    ):
        if not path.is_file():
            raise CheckpointError(f"There is no file {path}.", expected="a checkpoint", fix="Check the path.")
        with path.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header} bytes, which is more than {MAX_HEADER_BYTES}")
        file: Any = safe_open(path, framework="pt")
        state = {}
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            state[name] = StoredTensor(tuple(part.get_shape()), dtype, partial(file.get_tensor, name))
        return Content(state, file.metadata() or {})


def _read_index(path: Path) -> dict[str, str]:
    """The names of the tensors and, for each, the name of its shard."""
    fix = "Pass the .safetensors file, or the .safetensors.index.json of a sharded checkpoint."
    with refuse_failures(CheckpointError, f"{path.name} cannot be read", expected="the index of shards", fix=fix):
        document = read_json(path, MAX_INDEX_BYTES)
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map, so it is not the index of a sharded checkpoint")
        for name, shard in weight_map.items():
            plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(SUFFIX)
            if not plain or "\0" in shard:
                raise ValueError(f"the shard of {shown(name)} is not the name of a safetensors file beside it")
    return weight_map
