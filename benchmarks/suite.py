"""Which models a run measures, and how much of each: from a TOML file, or from the options of the command."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from flexvar_runtime import Bundle
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.files.strict_json import decode
from flexvar_runtime.model.precision import Precision

from .plans import Extent, names_of

NONE = "-"  # in place of a value: this bundle has none


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model: a `bundle`, or one that is exported for the run from `checkpoint` and `vae`, or from `random` weights of
    a size ("d16"), in `precision` (fp32). The torch peers need one of the latter two. quality: a table of quality by
    schedule.

    The rest is how much of it is measured, as in `Extent`; None is what the options say.
    """

    name: str
    bundle: str | None = None
    random: str | None = None
    checkpoint: str | None = None
    vae: str | None = None
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
                f"model {self.name!r:.100} with {' and '.join(given) or 'nothing to measure'}",
                expected="a name, and a bundle, or a checkpoint with its vae, or random weights",
                fix="give the checkpoint and its vae together, or random alone",
            )
        if self.precision not in (None, *Precision):
            raise InvalidInput(
                f"precision {self.precision!r:.100}", expected=" or ".join(Precision), fix="name one of them"
            )
        if self.precision is not None and self.bundle is not None:
            raise InvalidInput(
                f"model {self.name!r:.100} with a bundle and precision {self.precision}",
                expected="a precision for what is exported for the run",
                fix="leave it out: the bundle has one",
            )

    def extent(self, options: Extent) -> Extent:
        """How much of this model is measured where `options` say the rest."""
        own = {field.name: getattr(self, field.name) for field in fields(Extent)}
        return replace(options, **{key: value for key, value in own.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The form of the file: a list of tables [[model]]."""

    model: tuple[Entry, ...]


def read_suite(path: Path) -> tuple[Entry, ...]:
    """The models of a suite; files are relative to it. Raises ArtifactRefused, InvalidInput."""
    fix = "see benchmarks/standard.toml, which is one"
    try:
        entries = decode(
            Suite, tomllib.loads(path.read_text(encoding="utf-8")), where=path.name, fix=f"Correct {path.name}."
        ).model
    except ArtifactRefused as error:
        raise ArtifactRefused(error.got, expected=error.expected, fix=fix) from None
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise ArtifactRefused(f"{path.name}: {error}", expected="TOML in UTF-8", fix=fix) from error

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
    quality: Sequence[str],
) -> tuple[Entry, ...]:
    """A model for every bundle. An option is given once a bundle, in their order, `-` for none, or not at all.

    Raises InvalidInput, and ArtifactRefused for what is no bundle.
    """
    by_option = {"--name": names, "--checkpoint": checkpoints, "--vae": vaes, "--quality": quality}
    matched = [_matched(option, values, len(bundles)) for option, values in by_option.items()]
    return distinct(
        [
            Entry(
                name=name or names_of(Bundle.open(bundle)),
                bundle=str(bundle),
                checkpoint=checkpoint,
                vae=vae,
                quality=table,
            )
            for bundle, name, checkpoint, vae, table in zip(bundles, *matched, strict=True)
        ]
    )


def distinct(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Refuse no model, and two of one name. Raises InvalidInput."""
    names = [entry.name for entry in entries]
    if not names:
        raise InvalidInput("no model", expected="at least one", fix="name a bundle, or a suite: --suite FILE.toml")
    if len(set(names)) < len(names):
        raise InvalidInput(
            f"models {', '.join(map(repr, names))}",
            expected="each with a name of its own",
            fix="name them: --name a --name b, or name = in the suite",
        )
    return tuple(entries)


def _matched(option: str, values: Sequence[str], count: int) -> list[str | None]:
    if values and len(values) != count:
        raise InvalidInput(
            f"{len(values)} of {option} for {count} bundles",
            expected="one for every bundle, in their order, or none at all",
            fix=f"give {option} {NONE} for a bundle that has none",
        )
    return [None if value == NONE else value for value in values] or [None] * count
