"""Published `.pth` files, read without running anything that is in them.

`weights_only=True` always: a pickle that asks for code is refused. Training checkpoints also hold options and
optimiser state, whose classes (argparse.Namespace, numpy scalars, …) that rule would refuse as well: nobody reads
them, so a stand-in takes their place and not even those classes are run.
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
PLACES = (("trainer", "var_wo_ddp"), ("trainer", "vae_local"), ("model",))  # each key may be absent: a bare state
MARKS = {"transformer": ("blocks.", "word_embed.", "head."), "tokenizer": ("encoder.", "decoder.", "quantize.")}
DROPPED = ("attn_bias_for_masking", "quantize.codebook_used")  # a training mask and a usage counter
WRAPPERS = ("module.", "_orig_mod.")  # data-parallel and compiled training prefix every name


class _Discarded:
    """A value beside the weights that nobody looks at."""

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
    """The named tensors of a "transformer" or "tokenizer" checkpoint, wherever a published layout keeps them.

    Name prefixes of wrapped training and what is no parameter are taken off. Raises CheckpointError.
    """
    content = _read(path)
    states = [_clean(state) for state in _states(content)]
    for state in states:
        if _kind(state) == kind:
            return state
    if states and (other := _kind(states[0])):
        raise CheckpointError(
            f"{path.name}, which holds a {other}",
            expected=f"a {kind}",
            fix="check that transformer and tokenizer were not mixed up",
        )
    found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(
        f"{path.name} holding {found}",
        expected=f"the named tensors of a {kind}, bare or under " + ", ".join(" / ".join(place) for place in PLACES),
        fix="pass a FlexVAR checkpoint",
    )


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no file {path}", expected="a checkpoint", fix="check the path")
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a parser fed with arbitrary bytes: whatever it says, the file is refused
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise CheckpointError(
                f"{path.name}, which asks to run {asked[1]}",
                expected="tensors and plain containers; code in a pickle is never run",
                fix="get the file from its publisher, or convert it to safetensors where it was made",
            ) from error
        reason = str(error).strip() or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "not plain data: " + reason.split("WeightsUnpickler error:")[-1].strip()
        raise CheckpointError(
            f"{path.name}, which cannot be read ({reason.splitlines()[0]})",
            expected="a complete PyTorch checkpoint of tensors and plain containers",
            fix="download it again and compare its size",
        ) from error


def _states(content: Any) -> Iterator[State]:
    for place in PLACES:
        inner = content
        for key in place:
            if isinstance(inner, Mapping) and key in inner:
                inner = inner[key]
        named = isinstance(inner, Mapping) and all(isinstance(name, str) for name in inner)
        if named and inner and all(isinstance(value, Tensor) for value in inner.values()):
            yield dict(inner)


def _clean(state: State) -> State:
    while wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in state)), None):
        state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return {name: value for name, value in state.items() if name not in DROPPED}


def _kind(state: State) -> str | None:
    return next((kind for kind, marks in MARKS.items() if any(name.startswith(marks) for name in state)), None)
