"""What a bundle takes from the reference model: model facts, tables, defaults."""

from __future__ import annotations

import unicodedata
from dataclasses import fields
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime.bundle.manifest import Defaults
from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import decode, encode, loads
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.guidance import Guidance
from flexvar_runtime.model.sampling import Sampling
from flexvar_runtime.model.schedule import PUBLISHED, ScaleSchedule
from flexvar_runtime.model.tables import Tables

# The options of the published evaluation at 256 px.
PUBLISHED_DEFAULTS = Defaults(
    schedule=PUBLISHED["10"],
    guidance_scale=2.5,
    guidance_rule="ramp",
    top_k=900,
    top_p=0.95,
    greedy_scales="upstream",
    max_side=16,
)


def read_defaults(path: Path) -> Defaults:
    """The published defaults, replaced by the values of a JSON object in the file `path`. Raises InvalidInput."""
    names = [field.name for field in fields(Defaults) if field.name != "quality_order"]
    fix = f"Correct {path.name}."
    try:
        given = loads(read_small(path, fix=fix), where=path.name, fix=fix)
        if not isinstance(given, dict) or not set(given) <= set(names):
            keys = f"an object with keys among {', '.join(names)}"
            raise InvalidInput(f"{path.name} is {short(given)}, but it must be {keys}.", expected=keys, fix=fix)
        published = cast(dict[str, object], encode(PUBLISHED_DEFAULTS))
        found = decode(Defaults, {**published, **given}, where=path.name, fix=fix)
        ScaleSchedule.parse(found.schedule)
        Guidance(found.guidance_scale, found.guidance_rule, found.max_side)
        Sampling(found.top_k, found.top_p, found.greedy_scales, found.max_side)
    except ArtifactRefused as error:
        raise InvalidInput(error.got, expected=error.expected, fix=fix) from error
    return found


def model_facts(model: FlexVAR, tokenizer: Tokenizer, class_names: tuple[str, ...] | None = None) -> ModelFacts:
    """The model facts of a bundle.

    Raises ArtifactRefused for sizes outside the limits of a bundle, InvalidInput unless every class has one name.
    """
    config = model.config
    if class_names is not None:
        _check_names(class_names, config.classes)
    return ModelFacts(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        head_size=config.head_size,
        classes=config.classes,
        class_names=class_names,
        null_class=config.null_class,
        vocabulary=config.vocabulary,
        code_dim=config.code_dim,
        downsampling=tokenizer.config.downsampling,
        value_range=(-1.0, 1.0),
        position_side=config.position_side,
    )


def _check_names(names: tuple[str, ...], classes: int) -> None:
    if len(names) != classes:
        raise InvalidInput(
            f"There are {len(names)} class names, but the model has {classes} classes.",
            expected=f"{classes} class names",
            fix="Pass one name for each class, in label order.",
        )
    for name in names:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise InvalidInput(
                f"The class name {name!a} has control characters.",
                expected="text without control characters",
                fix="Correct the name.",
            )


def tables(model: FlexVAR, tokenizer: Tokenizer) -> Tables:
    """The tables that the host needs: codebook, position table and input bias."""

    def array(tensor: Tensor) -> NDArray[np.float32]:
        return np.ascontiguousarray(tensor.detach().float().cpu().numpy())

    return Tables(array(tokenizer.codebook_VD), array(model.pos_1LC[0]), array(model.word_embed.bias))
