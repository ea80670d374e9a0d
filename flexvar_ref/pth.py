"""Reading of published `.pth` files. No code in a file is ever run.

Files are loaded with `weights_only=True`, which refuses a pickle that asks for code. Training checkpoints also hold
options and optimiser state of other classes (argparse.Namespace, numpy scalars, …), which would be refused too. Nothing
here reads those values, so empty stand-ins are loaded in their place.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

State = dict[str, Tensor]
STATE_KEYS = (("trainer", "var_wo_ddp"), ("trainer", "vae_local"), ("model",))  # a bare state has none of these keys
NAME_PREFIXES = {"transformer": ("blocks.", "word_embed.", "head."), "tokenizer": ("encoder.", "decoder.", "quantize.")}
IGNORED_NAMES = ("attn_bias_for_masking", "quantize.codebook_used")  # a training mask and a usage counter
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # data-parallel and compiled training prefix every name


class _Discarded:
    """An empty stand-in for a value beside the weights."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _empty_dict(*arguments: object) -> dict[object, object]:
    return {}


_NUMPY = tuple(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct"))
_PATHS = tuple(f"pathlib.{module}{name}" for module in ("", "_local.") for name in ("PosixPath", "WindowsPath"))
_PLAIN = ("argparse.Namespace", "types.SimpleNamespace", "builtins.frozenset", "builtins.list", "builtins.dict")
_STAND_INS: list[Any] = [
    *((_Discarded, name) for name in (*_PLAIN, *_PATHS, *_NUMPY, "numpy.dtype", "numpy.ndarray")),
    (_empty_dict, "collections.defaultdict"),
]


def read_state(path: Path, kind: str) -> State:
    """The named tensors of a checkpoint in any published layout. kind: "transformer" or "tokenizer".

    Prefixes of data-parallel or compiled training are removed from the names, and tensors that are not parameters are
    left out. Raises CheckpointError.
    """
    content = _load(path)
    states = [_normalise_names(state) for state in _find_states(content)]
    for state in states:
        if _kind(state) == kind:
            return state
    if states and (other := _kind(states[0])):
        raise CheckpointError(
            f"{path.name} holds a {other}, not a {kind}.",
            expected=f"a {kind}",
            fix="Check that transformer and tokenizer were not mixed up.",
        )
    found = (
        f"the keys {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    )
    keys = ", ".join(" / ".join(path) for path in STATE_KEYS)
    raise CheckpointError(
        f"{path.name} holds {found}, not the named tensors of a {kind}.",
        expected=f"the named tensors of a {kind}, bare or under {keys}",
        fix="Pass a FlexVAR checkpoint.",
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.", expected="a checkpoint", fix="Check the path.")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the parser raises almost anything for a damaged file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise CheckpointError(
                f"{path.name} asks to run {asked[1]}, but code in a checkpoint is never run.",
                expected="tensors and plain containers; code in a pickle is never run",
                fix="Get the file from its publisher, or convert it to safetensors where it was made.",
            ) from error
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is not plain data: " + reason.split("WeightsUnpickler error:")[-1].strip()
        raise CheckpointError(
            f"{path.name} cannot be read: {first_sentence(reason)}",
            expected="a complete PyTorch checkpoint of tensors and plain containers",
            fix="Download it again and compare its size.",
        ) from error


def first_sentence(text: str) -> str:
    """The first sentence of another library's error message."""
    return f"{text.partition(chr(10))[0].partition('. ')[0].rstrip('.')}."


def _find_states(content: Any) -> Iterator[State]:
    for keys in STATE_KEYS:
        inner = content
        for key in keys:
            if isinstance(inner, Mapping) and key in inner:
                inner = inner[key]
        named = isinstance(inner, Mapping) and all(isinstance(name, str) for name in inner)
        if named and inner and all(isinstance(value, Tensor) for value in inner.values()):
            yield dict(inner)


def _normalise_names(state: State) -> State:
    while prefix := next((p for p in WRAPPER_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name: value for name, value in state.items() if name not in IGNORED_NAMES}


def _kind(state: State) -> str | None:
    return next((kind for kind, known in NAME_PREFIXES.items() if any(name.startswith(known) for name in state)), None)
