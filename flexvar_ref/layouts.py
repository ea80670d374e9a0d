"""Finds the weights in the content of a checkpoint, whatever they are wrapped in.

Wrappers are dictionaries (`{"trainer": {"var_wo_ddp": …}}`, `{"state_dict": …}`) and prefixes of names (`model.`).
The place of a set of weights consists of both: `trainer.var_wo_ddp`. Everything else in a file is ignored.
"""

from __future__ import annotations

import logging
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, InvalidInput
from .parsing import shown
from .pickles import Opaque
from .stored import State, Stored, StoredTensor

log = logging.getLogger(__name__)

MODEL, EMA = "model", "ema"
CHOICES = (EMA, MODEL)
_TRANSFORMER, _TOKENIZER = "transformer", "tokenizer"
_ROOTS = {  # first parts of the published names
    _TRANSFORMER: {"blocks", "class_emb", "head", "head_nm", "pos_1LC", "pos_start", "word_embed"},
    _TOKENIZER: {"decoder", "encoder", "post_quant_conv", "quant_conv", "quantize"},
}
_MARKS = {  # a set of weights holds at least one of these names
    _TRANSFORMER: {"word_embed.weight", "class_emb.weight", "head.weight", "pos_1LC"},
    _TOKENIZER: {"encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight"},
}
_ALL_ROOTS = _ROOTS[_TRANSFORMER] | _ROOTS[_TOKENIZER]
_IGNORED = ("attn_bias_for_masking", "quantize.codebook_used")  # a training mask and a usage counter
_TRAINING_PARTS = ("module", "_orig_mod")  # data-parallel and compiled training add these parts to names, also inside
_AVERAGE = re.compile(r"(?<![a-z])ema|ema(?![a-z])|averag", re.IGNORECASE)
_OF_OPTIMIZER = re.compile(r"(^|\.)(optim|exp_avg)")  # places of tensors that have the names of weights
_OF_VAR = re.compile(r"lvl_embed\.weight|quantize\.quant_resi\..*|encoder\.down\..*|decoder\.up\..*")
_MAX_DEPTH, _MAX_NAME = 8, 500  # nesting of wrappers, and characters of a name; both far above what checkpoints have


@dataclass(frozen=True)
class Weights:
    """A set of weights under their published names. kind: "transformer" or "tokenizer". place: "" without wrapper."""

    kind: str
    place: str
    state: State

    @property
    def choice(self) -> str:
        """ "ema" if `place` names averaged weights, otherwise "model"."""
        return EMA if _AVERAGE.search(self.place) else MODEL


def find_weights(content: Any, kind: str, name: str) -> list[Weights]:
    """The sets of weights of a kind in the content of a checkpoint. name: of the file, for errors.

    Raises CheckpointError if there is none, and for the checkpoints of VAR.
    """
    found = [weights for mapping in _mappings(content) for weights in _sets(*mapping)]
    found = [weights for weights in found if not _OF_OPTIMIZER.search(weights.place)]
    if any(_is_of_var(weights) for weights in found):
        raise CheckpointError(
            f"{name} is a checkpoint of VAR (FoundationVision/VAR), not of FlexVAR.",
            expected=f"a {kind} of FlexVAR",
            fix="Pass a checkpoint of FlexVAR, such as FlexVARd16-epo179.pth with FlexVAE.pth.",
        )
    if wanted := [weights for weights in found if weights.kind == kind]:
        return wanted
    if found:
        raise CheckpointError(
            f"{name} holds a {found[0].kind}, not a {kind}.",
            expected=f"a {kind}",
            fix="Check that transformer and tokenizer were not mixed up.",
        )
    if isinstance(content, Opaque):
        raise CheckpointError(
            f"{name} holds an object of the class {shown(content.name)}, not the named tensors of a {kind}.",
            expected=f"the named tensors of a {kind}",
            fix="Save the weights of the object: torch.save(model.state_dict(), 'weights.pth')",
        )
    names = sorted(key for key in content if isinstance(key, str)) if isinstance(content, dict) else []
    keys = ", ".join(map(shown, names[:8]))
    raise CheckpointError(
        f"{name} holds {f'the keys {keys}' if keys else f'a {type(content).__name__}'}, not the named tensors of a "
        f"{kind}.",
        expected=f"the named tensors of a {kind}",
        fix="Pass a FlexVAR checkpoint.",
    )


def check_choice(weights: str | None, files: Sequence[tuple[str, Sequence[Weights]]] = ()) -> None:
    """Raise InvalidInput unless `weights` is None, "ema" or "model", and CheckpointError if no file holds such weights.

    files: the name of each file, and the sets of weights in it.
    """
    if weights not in (None, *CHOICES):
        raise InvalidInput(
            f"weights is {shown(repr(weights))}, but it must be ema or model.",
            expected="ema or model",
            fix="Pass one of them.",
        )
    if weights is not None and files and all(one.choice != weights for _, sets in files for one in sets):
        raise CheckpointError(
            f"There are no {weights} weights in {' and '.join(name for name, _ in files)}.",
            expected=f"{weights} weights",
            fix="Leave out --weights (in Python: weights).",
        )


def choose(sets: Sequence[Weights], weights: str | None, name: str) -> State:
    """The state of the chosen weights. A file with only one set needs no choice. name: of the file, for errors.

    weights: "ema", "model" or None. Raises CheckpointError if the choice is missing or not enough.
    """
    kind, places = sets[0].kind, ", ".join(f"{one.place or 'its top level'} ({one.choice})" for one in sets[:8])
    choices = {one.choice for one in sets}
    if len(choices) > 1 and weights is None:
        raise CheckpointError(
            f"{name} holds {len(sets)} sets of weights of a {kind}: {places}.",
            expected="a choice",
            fix="Pass --weights ema for the averaged weights or --weights model for the others (in Python: "
            'weights="ema" or weights="model").',
        )
    fitting = [one for one in sets if len(choices) == 1 or one.choice == weights]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{name} holds {len(fitting)} sets of {fitting[0].choice} weights of a {kind}: {places}.",
            expected="one set",
            fix="Save the set that you want in a file of its own: torch.save(state, 'weights.pth')",
        )
    if fitting[0].place:
        log.info("%s: the weights of the %s are those under %s.", name, kind, shown(fitting[0].place))
    return fitting[0].state


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dictionary of a content with the keys that lead to it, each once."""
    seen: set[int] = set()
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    while waiting:
        path, mapping = waiting.popleft()
        if not isinstance(mapping, dict) or id(mapping) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(mapping))
        named = {key: value for key, value in mapping.items() if isinstance(key, str) and len(key) <= _MAX_NAME}
        yield path, named
        waiting.extend(((*path, key), value) for key, value in named.items() if isinstance(value, dict))


def _sets(path: tuple[str, ...], mapping: dict[str, Any]) -> Iterator[Weights]:
    """The sets of weights whose names are keys of one dictionary, grouped by the prefix of their names."""
    by_prefix: dict[tuple[str, ...], dict[str, Stored]] = {}
    others: list[tuple[tuple[str, ...], StoredTensor]] = []
    for key, value in mapping.items():
        parts = tuple(part for part in key.split(".") if part not in _TRAINING_PARTS)
        root = next((i for i, part in enumerate(parts) if part in _ALL_ROOTS), None)
        if isinstance(value, StoredTensor | Opaque) and root is not None:
            by_prefix.setdefault(parts[:root], {})[".".join(parts[root:])] = value
        elif isinstance(value, StoredTensor) and not _is_counter(parts, value):
            others.append((parts, value))
    for parts, value in others:  # an unknown name belongs to the weights with the longest prefix
        fitting = [prefix for prefix in by_prefix if parts[: len(prefix)] == prefix]
        if fitting:
            longest = max(fitting, key=len)
            by_prefix[longest][".".join(parts[len(longest) :])] = value
    for prefix, state in by_prefix.items():
        kind = next((kind for kind, marks in _MARKS.items() if not marks.isdisjoint(state)), None)
        if kind is not None:
            kept = {name: value for name, value in state.items() if name not in _IGNORED}
            yield Weights(kind, ".".join((*path, *prefix)), kept)


def _is_counter(parts: tuple[str, ...], value: StoredTensor) -> bool:
    """Whether a tensor is a number or holds integers, such as a loss or a step that is stored beside the weights."""
    single = math.prod(value.shape) == 1 and len(parts) == 1
    return single or not value.shape or (value.dtype is not None and not value.dtype.is_floating_point)


def _is_of_var(weights: Weights) -> bool:
    """Whether the weights have names or shapes that only VAR has."""
    positions = weights.state.get("pos_1LC")
    flat = isinstance(positions, StoredTensor) and len(positions.shape) == 3  # FlexVAR's table has two dimensions
    return flat or any(_OF_VAR.fullmatch(name) for name in weights.state)
