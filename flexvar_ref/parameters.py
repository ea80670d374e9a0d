"""Puts the tensors of a checkpoint into a model. Nothing is read before names, shapes, types and sizes are checked."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .parsing import refuse_failures, shown
from .pickles import Opaque
from .safetensors_files import list_files
from .stored import State, StoredTensor
from .tokenizer import Tokenizer
from .transformer import FlexVAR

MAX_NAMES = 40  # an error message lists this many parameters and counts the rest
Tensors = dict[str, StoredTensor]


def published_name(name: str) -> str:
    """The published name of a parameter. Only the quantizer is called differently: `quantize` is a method here."""
    return re.sub(r"^quantizer\.", "quantize.", name)


def assign_parameters(model: FlexVAR | Tokenizer, state: Tensors, path: Path) -> None:
    """Set the parameters of `model` to the values of `state`, in float32.

    Raises CheckpointError, which names every parameter that is missing, unexpected, or of the wrong shape.
    """
    own = {published_name(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    shapes = [
        f"{name} has {tuple(state[name].shape)}, not {shape}"
        for name, (_, shape) in own.items()
        if name in state and state[name].shape != shape
    ]
    faults = {
        "Missing": sorted(own.keys() - state.keys()),
        "Unexpected": sorted(state.keys() - own.keys()),
        "Wrong shape": shapes,
    }
    if any(faults.values()):
        raise CheckpointError(
            f"{path.name} does not hold the {len(own)} parameters of a model of its size. "
            + " ".join(f"{what}: {_join_names(names)}." for what, names in faults.items() if names),
            expected=f"exactly the {len(own)} parameters of a model of its sizes",
            fix="Use a complete checkpoint. Save a model with fewer blocks than heads with flexvar_ref.save.",
        )
    _require_bytes(state, path)
    values = {own[name][0]: _float32(value, name, path) for name, value in state.items()}
    model.load_state_dict(values, assign=True)


def _require_bytes(state: Tensors, path: Path) -> None:
    """Raise CheckpointError if the tensors together take more memory than the file has bytes.

    Tensors that repeat the elements of one storage do, and fill the memory when they are read.
    """
    needed = sum(value.nbytes for value in state.values())
    size = sum(file.stat().st_size for file in list_files(path))
    if needed > size:
        raise CheckpointError(
            f"{path.name} has {size} bytes, but its weights would take {needed} bytes of memory.",
            expected="weights that are stored element by element",
            fix="Save the weights as contiguous tensors: tensor.contiguous()",
        )


def dense(state: State, path: Path) -> Tensors:
    """The state, if all its weights are dense and of a floating-point type. Raises CheckpointError."""
    dense: dict[str, StoredTensor] = {}
    for name, value in state.items():
        found = value.name if isinstance(value, Opaque) else str(value.dtype or "an unknown type")
        if isinstance(value, Opaque) or value.dtype is None or not value.dtype.is_floating_point:
            raise CheckpointError(
                f"{path.name} holds {shown(name)} as {shown(found)}, but it must hold dense floating-point weights.",
                expected="dense floating-point weights",
                fix="Use the checkpoint from before quantisation.",
            )
        dense[name] = value
    return dense


def _float32(stored: StoredTensor, name: str, path: Path) -> Tensor:
    with refuse_failures(
        CheckpointError,
        f"{path.name} cannot be read: {name}",
        expected="a complete checkpoint",
        fix="Download it again and compare its size.",
    ):
        value = stored.read().detach().to(torch.float32, copy=True)  # a copy, because the file is memory-mapped
    if not value.isfinite().all():
        raise CheckpointError(
            f"{path.name} holds NaN or infinity in {name}.", expected="finite weights", fix="Use another checkpoint."
        )
    return value


def _join_names(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(map(shown, names[:MAX_NAMES])) + (f" and {rest} more" if rest > 0 else "")
