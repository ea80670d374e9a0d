"""The models that a run measures, and how much of each: from a TOML file, or from the options of the command."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from flexvar_runtime import Bundle
from flexvar_runtime.checks import shown
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import decode
from flexvar_runtime.model.precision import Precision

from .workload import Extent, names_of

MAX_BYTES = 32 << 10  # tomllib takes time in proportion to the square of a dotted key: seconds at this size
MOST_LETTERS = 100  # of the name of a model, from which files are named
WEIGHTS = ("ema", "model")
NONE = "-"  # the value of an option for a bundle without one


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of a suite.

    It is a `bundle`, or it is exported for the run in `precision` (default fp32): from `checkpoint` and `vae`, or from
    `random` weights of a size ("d16"). weights: "ema" or "model", for a checkpoint that holds both. The torch peers
    need an exported model. quality: a file with the quality of each schedule.

    The other fields say how much is measured, as in `Extent`. None takes the options of the command.
    """

    name: str
    bundle: str | None = None
    random: str | None = None
    checkpoint: str | None = None
    vae: str | None = None
    weights: str | None = None
    precision: str | None = None
    quality: str | None = None
    variants: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    repeats: int | None = None
    seconds: float | None = None
    requests: int | None = None
    costs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        pair = (self.checkpoint is None) == (self.vae is None)
        sources = (self.bundle is not None or self.checkpoint is not None) + (self.random is not None)
        if not pair or sources != 1 or not self.name:
            given = [key for key in ("bundle", "random", "checkpoint", "vae") if getattr(self, key) is not None]
            raise InvalidInput(
                f"The model {self.name!r:.100} has {' and '.join(given) or 'nothing to measure'}. It needs a name, and "
                "either a bundle, or a checkpoint with its vae, or random.",
                expected="a name, and a bundle, or a checkpoint with its vae, or random weights",
                fix="Give checkpoint and vae together, or random alone.",
            )
        if not self.name.isprintable() or len(self.name) > MOST_LETTERS:
            expected = f"at most {MOST_LETTERS} printable characters"
            got = f"The name {shown(self.name)} of a model must have {expected}."
            raise InvalidInput(got, expected=expected, fix="Give it another name.")
        if self.weights is not None and (self.checkpoint is None or self.weights not in WEIGHTS):
            wrong = "needs its checkpoint" if self.checkpoint is None else f"is {shown(self.weights)}"
            raise InvalidInput(
                f"weights of the model {self.name!r:.100} {wrong}.",
                expected="ema or model, and a checkpoint",
                fix="Leave out weights, or give ema or model with a checkpoint.",
            )
        if self.precision not in (None, *Precision):
            raise InvalidInput(
                f"precision of the model {self.name!r:.100} is {self.precision!r:.100}, which is unknown.",
                expected=" or ".join(Precision),
                fix=f"Use one of: {', '.join(Precision)}.",
            )
        if self.precision is not None and self.bundle is not None:
            raise InvalidInput(
                f"precision of the model {self.name!r:.100} cannot be combined with its bundle, which has a precision.",
                expected="a precision for an exported model",
                fix="Leave out precision.",
            )

    def extent(self, options: Extent) -> Extent:
        """How much of this model is measured: its own fields, and `options` for those that are None."""
        own = {field.name: getattr(self, field.name) for field in fields(Extent)}
        return replace(options, **{key: value for key, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The content of a suite file: a list of tables [[model]]."""

    model: tuple[Entry, ...]


def read_suite(path: Path) -> tuple[Entry, ...]:
    """The models of a suite. Its paths are relative to the file. Raises ArtifactRefused and InvalidInput."""
    fix = f"Correct {path.name}. benchmarks/standard.toml is an example."
    content = read_small(path, fix="Check the path of the suite.", most=MAX_BYTES)
    with refuse_failures(f"{path.name} is not a suite in TOML", expected="TOML in UTF-8", fix=fix):
        document = tomllib.loads(content.decode("utf-8"))
    entries = decode(Suite, document, where=path.name, fix=fix).model

    def beside(name: str | None) -> str | None:
        return None if name is None else str(path.parent / name)

    return distinct(
        [
            replace(
                entry,
                bundle=beside(entry.bundle),
                checkpoint=beside(entry.checkpoint),
                vae=beside(entry.vae),
                quality=beside(entry.quality),
            )
            for entry in entries
        ]
    )


def from_options(
    bundles: Sequence[Path],
    *,
    names: Sequence[str],
    checkpoints: Sequence[str],
    vaes: Sequence[str],
    weights: Sequence[str],
    quality: Sequence[str],
    allow_unproved: bool = False,
) -> tuple[Entry, ...]:
    """One model for each bundle. Each option has one value for each bundle, in their order, or no value at all.

    The value `-` means none. Raises InvalidInput, and ArtifactRefused for a folder that is not a bundle.
    """
    by_option = {
        "--name": names,
        "--checkpoint": checkpoints,
        "--vae": vaes,
        "--weights": weights,
        "--quality": quality,
    }
    matched = [_matched(option, values, len(bundles)) for option, values in by_option.items()]
    return distinct(
        [
            Entry(
                name=name or names_of(Bundle.open(bundle, allow_unproved=allow_unproved)),
                bundle=str(bundle),
                checkpoint=checkpoint,
                vae=vae,
                weights=chosen,
                quality=table,
            )
            for bundle, name, checkpoint, vae, chosen, table in zip(bundles, *matched, strict=True)
        ]
    )


def distinct(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The models as a tuple. Raises InvalidInput without any model, and for two models of one name."""
    names = [entry.name for entry in entries]
    if not names:
        raise InvalidInput(
            "There is no model to measure.", expected="at least one", fix="Pass a bundle, or a suite: --suite FILE.toml"
        )
    if len(set(names)) < len(names):
        raise InvalidInput(
            f"Two models have the same name: {', '.join(map(repr, names))}.",
            expected="a different name for each model",
            fix="Give each a different name: --name a --name b, or name = in the suite.",
        )
    return tuple(entries)


def _matched(option: str, values: Sequence[str], count: int) -> list[str | None]:
    if values and len(values) != count:
        raise InvalidInput(
            f"{option} is given {len(values)} times for {count} bundles.",
            expected="one value for each bundle, or none",
            fix=f"Give it once for each bundle, in their order. {option} {NONE} means none.",
        )
    return [None if value == NONE else value for value in values] or [None] * count
