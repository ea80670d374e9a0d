"""The options of `gpu_check.py`, and the combinations of them that are allowed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexvar_runtime.errors import InvalidInput

from .plan import BATCHES, GENERATIONS, GPU_BACKENDS, MINUTES, MODELS
from .stages import SECONDS

PLAN = "plan"  # the mode without --merge, --pack, --stage and --rehearse


@dataclass(frozen=True)
class Mode:
    """The options that a mode needs, and the other options that it allows."""

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
MISSING = {
    "out": ("--out is missing.", "Add --out DIR."),
    "carried": ("--stage needs --carried.", "Add --carried DIR, the folder that --pack made."),
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


def parse(argv: Sequence[str] | None, description: str) -> tuple[str, argparse.Namespace]:
    """The mode and all options, with defaults. Raises InvalidInput for options that do not go together."""
    given = vars(_parser(description).parse_args(argv))
    chosen = [name for name in MODES if name in given]
    mode = chosen[0] if chosen else PLAN
    allowed = {mode, *MODES[mode].needed, *MODES[mode].others}
    of_mode = "without --stage, --pack, --rehearse or --merge" if mode == PLAN else f"with --{mode}"
    for name in given:
        if name not in allowed:
            raise InvalidInput(
                f"--{name} cannot be used {of_mode}.", expected="options of one mode", fix="Leave it out."
            )
    for name in MODES[mode].needed:
        if name not in given:
            got, fix = MISSING[name]
            raise InvalidInput(got, expected=f"--{name}", fix=fix)
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
    add("--out", type=Path, metavar="DIR", help="Folder for the result, a JSON file. Phases of an earlier result stay.")
    stages = parser.add_argument_group("a GPU machine that is lent for a quarter of an hour")
    stages.add_argument(
        "--pack", type=Path, metavar="DIR", help="Make the new folder DIR, with all that travels there."
    )
    stages.add_argument("--cuobjdump", type=Path, metavar="FILE", help="NVIDIA's cuobjdump, for --pack.")
    limits = ", ".join(f"{name}: {seconds:.0f} s" for name, seconds in SECONDS.items())
    stages.add_argument("--stage", choices=tuple(SECONDS), help=f"Run a stage. Time limits: {limits}.")
    stages.add_argument("--carried", type=Path, metavar="DIR", help="The folder that --pack made, for --stage.")
    stages.add_argument("--rehearse", action="store_true", help="Run both stages here without a GPU, from a copy.")
    depths, batches = (",".join(map(str, numbers)) for numbers in (MODELS, BATCHES))
    add("--depths", type=_numbers, help=f"Depths of the models, comma-separated, in order. Default: {depths}.")
    add("--batches", type=_numbers, help=f"Batch sizes, comma-separated. Default: {batches}.")
    backends = ",".join(GPU_BACKENDS)
    add("--backends", type=lambda text: tuple(text.split(",")), help=f"Backends to measure. Default: {backends}.")
    add("--precision", choices=("fp16", "bf16"), help="Precision of the exported graphs. Default: fp16.")
    add("--minutes", type=float, help=f"Time limit for the whole run, in minutes. Default: {MINUTES:g}.")
    growth = f"Number of generations in the memory-growth test. Default: {GENERATIONS}."
    add("--generations", type=int, help=growth)
    add("--only", nargs="+", metavar="PHASE", help="Run only these phases or jobs, and what they need.")
    tiny = "Use only the tiny model. With --pack and --stage: on an emulated GPU."
    add("--tiny", action="store_true", help=tiny)
    add("--work", type=Path, metavar="DIR", help="Keep bundles and engines in DIR, for later runs of the same sources.")
    add("--merge", type=Path, metavar="DIR", help="Put the results in --out among those in DIR. Measure nothing.")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
