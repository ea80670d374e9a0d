"""The options of `gpu_check.py`, and which of them go together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import BATCHES, GENERATIONS, GPU_BACKENDS, MINUTES, MODELS
from .stages import SECONDS

PLAN = "plan"  # what is done without one of the options that name something else


@dataclass(frozen=True)
class Mode:
    """Options that something needs, and those that it may have beside them."""

    needed: tuple[str, ...]
    others: tuple[str, ...] = ()


MODES = {
    "merge": Mode(("out",)),
    "pack": Mode((), ("tiny", "work", "cuobjdump")),
    "stage": Mode(("carried", "out"), ("tiny", "work", "only")),
    "rehearse": Mode(("out",)),
    PLAN: Mode(
        ("out",),
        ("depths", "batches", "backends", "precision", "minutes", "generations", "only", "tiny", "work"),
    ),
}
FOLDERS = ("out", "work", "carried")
DEFAULTS: dict[str, Any] = {
    "depths": MODELS,
    "batches": None,
    "backends": GPU_BACKENDS,
    "precision": "fp16",
    "minutes": MINUTES,
    "generations": None,
    "only": None,
    "tiny": False,
    "work": None,
    "cuobjdump": None,
}


class UsageError(ValueError):
    """Options that do not go together, in one sentence."""


def parse(argv: Sequence[str] | None, description: str) -> tuple[str, argparse.Namespace]:
    """The mode, and all its options. Raises UsageError."""
    given = vars(_parser(description).parse_args(argv))
    chosen = [name for name in MODES if name in given]
    mode = chosen[0] if chosen else PLAN
    allowed = {mode, *MODES[mode].needed, *MODES[mode].others}
    of_mode = "without --stage, --pack, --rehearse or --merge" if mode == PLAN else f"with --{mode}"
    for name in given:
        if name not in allowed:
            raise UsageError(f"--{name} cannot be used {of_mode}.")
    for name in MODES[mode].needed:
        if name not in given:
            raise UsageError(f"--{name} DIR is missing; it is needed {of_mode}.")
    return mode, argparse.Namespace(**{**DEFAULTS, **given})


def recorded_options(mode: str, arguments: argparse.Namespace) -> dict[str, str]:
    """The options that a mode used, for its result, without folders of the machine."""
    used = (mode, *MODES[mode].needed, *MODES[mode].others)
    given = {name: getattr(arguments, name) for name in used if name not in FOLDERS and hasattr(arguments, name)}
    if arguments.tiny:
        given.pop("depths", None)
    return {name: str(value) for name, value in given.items() if value is not None}


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder for the result, a JSON file")
    stages = parser.add_argument_group("a GPU machine for a quarter of an hour")
    stages.add_argument("--pack", type=Path, metavar="DIR", help="make the new folder DIR with all that travels there")
    stages.add_argument("--cuobjdump", type=Path, metavar="FILE", help="for --pack: NVIDIA's tool, if not on PATH")
    limits = ", ".join(f"{name}: {seconds:.0f} s" for name, seconds in SECONDS.items())
    stages.add_argument("--stage", choices=tuple(SECONDS), help=f"run a stage there ({limits})")
    stages.add_argument("--carried", type=Path, metavar="DIR", help="for --stage: the folder that --pack made")
    stages.add_argument("--rehearse", action="store_true", help="run both stages here, without a GPU, from a copy")
    add("--depths", type=_numbers, help="comma-separated, the first is measured first; by default 16,20,24")
    add("--batches", type=_numbers, help=f"comma-separated, by default {','.join(map(str, BATCHES))}")
    add("--backends", type=lambda text: tuple(text.split(",")), help=f"by default {','.join(GPU_BACKENDS)}")
    add("--precision", choices=("fp16", "bf16"), help="of the exported graphs, by default fp16")
    add("--minutes", type=float, help=f"for everything, by default {MINUTES:g}")
    add("--generations", type=int, help=f"watched for growth, by default {GENERATIONS}")
    add("--only", nargs="+", metavar="PHASE", help="phases or kinds of phases, with all they need")
    add("--tiny", action="store_true", help="the tiny model only; with --pack and --stage: what a rehearsal uses")
    add("--work", type=Path, metavar="DIR", help="keep bundles and engines there, and use them again")
    add("--merge", type=Path, metavar="DIR", help="measure nothing: put the results in --out among those in DIR")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
