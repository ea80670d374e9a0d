"""Random calls of the Python interface. Names and parameters are those of the package, so new ones are included."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from desk import lay_out
from outcome import Wrong, refused

import flexvar_runtime
from flexvar_runtime import FlexVARPipeline, Guidance, Sampling, ScaleSchedule  # noqa: F401 - for the expressions
from flexvar_runtime.editing.options import Edit, EditOptions

REFERENCE: dict[str, Any] = {"labels": [1, 2], "schedule": "1_2_3", "seed": 7}
CHECKED = 20  # after one call in 20, a request with known images is made
WEIGHTS = {"pipeline": 8, "pipeline.edit": 8, "pipeline.decode": 4, "pipeline.encode": 4}
LEFT_OUT = {"pipeline.close", "pipeline.from_bundle", "Choice", "GenerationOutput", "ScaleStep"}
"""Not called: one closes the pipeline, one is listed under another name, and the package only returns the others."""


class Whole:
    """An object that is a whole number to `operator.index` alone."""

    def __index__(self) -> int:
        return 2


CALLABLE = ("int", "Guidance", "lambda: 1")  # not passed to parameters that take a callback
WILD: tuple[str, ...] = (
    *("None", "True", "False", "-1", "0", "1", "2"),
    *("2**31", "2**63", "2**64", "-(2**64)", "10**400", "0.5", "1e308", "-0.0"),
    *("float('nan')", "float('inf')", "float('-inf')", "1j", "''"),
    *("'1'", "'a' * 9999", "'\\0'", "'\\udcff'", "'é'", "b'1'"),
    *("[]", "()", "{}", "set()", "[None]", "[[1]]"),
    *("[1, 'a']", "[0.5]", "[True]", "['1_2']", "{'a': 1}", "object()", "..."),
    *("Whole()", "iter([1])", "(n for n in [1])", "range(3)", "range(10**7)", "Path('.')"),
    *("np.int64(1)", "np.float32('nan')", "np.uint8(255)"),
    *("np.bool_(True)", "np.array(1)", "np.array([1])", "np.array(['a'])"),
    *("np.zeros((0,))", "np.zeros((2, 2))"),
    *("np.array([None])", "np.array([1, 2], dtype=object)", "np.ma.masked_array([1], [1])"),
    *("np.zeros((1, 4, 4), np.int32)", "np.full((1, 2, 2), -1)"),
    *("np.full((1, 2, 2), 10**6)", "np.zeros((1, 2, 2), np.uint64)"),
    *("np.zeros((8, 8, 3), np.uint8)", "np.zeros((2, 8, 8, 3), np.uint8)"),
    *("np.zeros((8, 8, 4), np.uint8)", "np.zeros((1, 2, 2))"),
    *("np.zeros((7, 5), np.uint8)", "np.zeros((0, 8, 3), np.uint8)"),
    *("np.zeros((8, 8), bool)", "np.zeros((3, 2**20, 1), np.uint8)"),
    *("Guidance()", "Sampling()", "ScaleSchedule.parse('1_2')", "[ScaleSchedule.parse('1_2')]", "[Guidance()] * 2"),
    *CALLABLE,
)
VALID: dict[str, tuple[str, ...]] = {
    "anchor": ("'centre'", "'top'"),
    "backend": ("'auto'", "'ort-cpu'"),
    "batch_sizes": ("(1,)", "[1, 2]"),
    "batches": ("(1,)",),
    "deadline_ms": ("1e5", "None"),
    "earlier": ("None", "ScaleSchedule.parse('1_2_4')"),
    "feather": ("0", "2"),
    "first_index": ("0", "5", "[0, 3]"),
    "fit": ("'resize'", "'crop'", "'pad'"),
    "guidance": ("None", "2.5", "Guidance(scale=2.0)", "[1.0, 2.0]"),
    "image": ("'photo.jpg'", "'clear.png'", "np.zeros((16, 24, 3), np.uint8)", "[np.zeros((8, 8, 3), np.uint8)] * 2"),
    "keep_decoded": ("True", "False"),
    "labels": ("[3]", "[0, 10]", "4", "None"),
    "mask": ("None", "'mask.png'", "np.ones((16, 24), bool)"),
    "on_scale": ("None", "print"),
    "path": ("'tiny.bundle'",),
    "rule": ("'ramp'", "'constant'"),
    "sampling": ("None", "Sampling(top_k=5)", "Sampling(top_p=0.5)"),
    "schedule": ("None", "'1_2_4'", "ScaleSchedule.parse('1_2x3_4x6')", "[1, 2, 4]", "((1, 1), (2, 3))"),
    "schedules": ("['1_2_4']",),
    "seed": ("None", "0", "[1, 2]"),
    "sides": ("(4, 0, 0, 0)", "(0, 4, 8, 4)"),
    "size": ("None", "(16, 16)", "(4, 4)", "(32, 48)"),
    "steps": ("None", "1", "4"),
    "task": ("'refine'", "'inpaint'", "'outpaint'", "'expand'"),
    "text": ("'1_2_4'",),
    "threads": ("None", "1", "2"),
    "tokens": ("np.zeros((1, 4, 4), np.int32)", "np.ones((2, 2, 3), np.int64)"),
    "top_k": ("0", "1", "5"),
    "top_p": ("0.0", "0.5", "1.0"),
}
"""Expressions that a call may accept, by the name of the parameter."""


@dataclass(frozen=True)
class Call:
    """A call of the interface. arguments: an expression for each parameter that is given."""

    target: str
    arguments: dict[str, str]

    def __str__(self) -> str:
        return f"{self.target}({', '.join(f'{name}={text}' for name, text in self.arguments.items())})"


@cache
def interface() -> dict[str, tuple[str, ...]]:
    """The callables of the package and the names of their parameters: all of the pipeline, and all classes."""
    found: dict[str, Any] = {"pipeline": FlexVARPipeline.__call__, "Edit": Edit}
    for name, member in inspect.getmembers(FlexVARPipeline, callable):
        if not name.startswith("_"):
            found[f"pipeline.{name}"] = member
    for name in flexvar_runtime.__all__:
        kind = getattr(flexvar_runtime, name)
        if not inspect.isclass(kind) or issubclass(kind, BaseException):
            continue
        if kind is not FlexVARPipeline:
            found[name] = kind
        for method, member in inspect.getmembers(kind, inspect.ismethod):
            if not method.startswith("_"):
                found[f"{name}.{method}"] = member
    parameters = {name: tuple(inspect.signature(member).parameters) for name, member in found.items()}
    return {
        name: tuple(part for part in names if part not in ("self", "options")) + _options(names)
        for name, names in parameters.items()
        if name not in LEFT_OUT
    }


def _options(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(EditOptions.__annotations__) if "options" in names else ()


def call_of(seed: int) -> Call:
    """The call of a seed."""
    rng = Random(seed)
    targets = interface()
    [target] = rng.choices(list(targets), [WEIGHTS.get(name, 1) for name in targets])
    valid, share = rng.choice(((0.97, 0.3), (0.9, 0.3), (0.6, 0.5), (0.0, 0.3)))
    arguments = {}
    for name in targets[target]:
        if name in _required(target) or rng.random() < share:
            wild = WILD[: -len(CALLABLE)] if name.startswith("on_") or name == "clock" else WILD
            pool = VALID.get(name, ("0", "1", "None")) if rng.random() < valid else wild
            arguments[name] = rng.choice(pool)
    return Call(target, arguments)


@cache
def _required(target: str) -> set[str]:
    """The parameters of a callable that have no default."""
    parameters = inspect.signature(_resolve(target, FlexVARPipeline)).parameters.values()
    needed = (each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD)
    return {each.name for each in needed} - {"self"}


def _resolve(target: str, pipeline: Any) -> Any:
    """The callable of a name. pipeline: an open one, or its class."""
    first, *rest = target.split(".")
    if first == "pipeline":
        return getattr(pipeline, rest[0]) if rest else pipeline.__call__
    found = Edit if first == "Edit" else getattr(flexvar_runtime, first)
    return getattr(found, rest[0]) if rest else found


def prepare(desk: Path) -> None:
    global pipeline, reference
    pipeline = FlexVARPipeline.from_bundle(desk / "tiny.bundle", "ort-cpu", threads=1)
    reference = pipeline(**REFERENCE).images


def show(desk: Path, seed: int) -> str:
    """The call of a seed."""
    return str(call_of(seed))


def run(desk: Path, case: Path, seed: int) -> str:
    """Make the call of a seed. Returns how it ended. Raises Wrong."""
    call = call_of(seed)
    lay_out(desk, case, list(call.arguments.values()))
    os.chdir(case)
    values = {name: eval(text) for name, text in call.arguments.items()}

    def make() -> None:
        made = _resolve(call.target, pipeline)(**values)
        if inspect.isgenerator(made):
            for _ in made:
                pass
        if isinstance(made, FlexVARPipeline):
            made.close()
        if isinstance(made, flexvar_runtime.GenerationOutput) and made.settings:
            _require_images(made)

    ended = refused(make)
    if seed % CHECKED == 0 and not np.array_equal(pipeline(**REFERENCE).images, reference):
        raise Wrong("afterwards the pipeline gives other images")
    return ended or "returned"


def _require_images(made: flexvar_runtime.GenerationOutput) -> None:
    images = made.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(made.settings):
        raise Wrong(f"images of shape {images.shape} and dtype {images.dtype} for {len(made.settings)} settings")
