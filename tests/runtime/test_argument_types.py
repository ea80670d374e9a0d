"""Arguments of every wrong type are refused with a typed error, never with TypeError or AttributeError."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_runtime import (
    Bundle,
    CostRow,
    FlexVARError,
    FlexVARPipeline,
    Guidance,
    InvalidInput,
    Sampling,
    ScaleSchedule,
)
from flexvar_runtime.model.sampling import probabilities, sample


class Unfriendly:
    """An object whose methods raise."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __array__(self, *_: object, **__: object) -> None:
        raise RuntimeError("no array")

    def __iter__(self) -> None:
        raise RuntimeError("no entries")

    def __eq__(self, _: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


WRONG: dict[str, Any] = {
    "object": object(),
    "unfriendly": Unfriendly(),
    "bytes": b"abc",
    "huge": 10**5000,
    "large": 10**12,
    "NaN": math.nan,
    "infinity": math.inf,
    "complex": 1j,
    "nested": nested(2000),
    "ragged": [[1, 2], [3]],
    "objects": np.array([object(), None], object),
    "floats": np.zeros((2, 3)),
    "0-d": np.array(1.5),
    "0-d object": np.array(object(), object),
    "records": np.zeros(2, [("a", "i4")]),
    "date": np.datetime64("2020"),
    "dict": {"a": 1},
    "set": {1, 2},
    "endless": range(10**12),
    "text": "x" * 100_000,
    "type": type,
    "function": lambda *_: 1,
    "surrogate": "\udce9",
    "NUL": "a\0b",
}
IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[FlexVARPipeline]:
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipeline:
        yield pipeline


def functions(pipe: FlexVARPipeline) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions with valid arguments, of which each is replaced by wrong ones."""
    request = {"labels": [0], "schedule": "1", "guidance": 1.0, "sampling": Sampling(), "seed": 0, "first_index": 0}
    edit = {"image": IMAGE, "mask": None, "steps": 2, "paste": False, "feather": 0, "anchor": "top"}
    cost = {"schedule": "1_2", "batch": 1, "guided": True, "filters": "none", "p90": 1.0, "median": 1.0, "samples": 1}

    def open_(**arguments: Any) -> None:
        FlexVARPipeline.from_bundle(**{"path": pipe.bundle.path, "backend": "ort-cpu", **arguments}).close()

    return {
        "from_bundle": (open_, dict.fromkeys(("path", "backend", "device", "threads", "engines", "shapes_kept"))),
        "call": (pipe, {**request, "keep_decoded": False, "on_scale": None, "deadline_ms": 1.0}),
        "iter_scales": (lambda **arguments: list(pipe.iter_scales(**arguments)), request),
        "edit": (pipe.edit, {**edit, "task": "refine", "fit": "resize", "strength": 0.5, "size": None}),
        "outpaint": (pipe.edit, {**edit, "task": "outpaint", "sides": (16, 0, 0, 0), "labels": 0, "earlier": None}),
        "check": (pipe.check, {"labels": 0, "seed": 0, "first_index": 0}),
        "warmup": (pipe.warmup, {"schedule": "1", "batch_sizes": (1,), "guidance": 0, "sampling": None}),
        "decode": (pipe.decode, {"tokens": np.zeros((1, 1, 1), np.int32)}),
        "encode": (pipe.encode, {"image": IMAGE[None], "size": (1, 1)}),
        "choose": (pipe.choose_schedule, {"images": 1, "deadline_ms": 1, "guidance": 0, "sampling": None}),
        "measure": (
            pipe.measure_costs,
            {"batch_sizes": (), "schedules": (), "repeats": 1, "on_row": None, "clock": None},
        ),
        "parse": (ScaleSchedule.parse, {"value": "1"}),
        "for_size": (ScaleSchedule.for_size, {"size": (4, 4), "steps": 3, "trained_side": 16}),
        "Guidance": (Guidance, {"scale": 1.0, "rule": "ramp", "max_side": 16}),
        "Sampling": (Sampling, {"top_k": 1, "top_p": 0.5, "greedy_scales": "none", "max_side": 16}),
        "weights": (Guidance().weights, {"schedule": "1_2"}),
        "greedy": (Sampling().greedy, {"h": 1, "w": 1}),
        "probabilities": (probabilities, {"logits": np.zeros((2, 8), np.float32), "top_k": 2, "top_p": 0.5}),
        "sample": (lambda **a: sample(**a, top_k=2, top_p=0.5), {"logits": np.zeros((1, 8)), "draws": [0]}),
        "open": (Bundle.open, {"path": pipe.bundle.path, "workers": 1}),
        "file": (pipe.bundle.file, {"name": "tables.npz"}),
        "graph": (pipe.bundle.graph, {"name": "step"}),
        "CostRow": (CostRow, cost),
    }


NAMES = (
    *("from_bundle", "call", "iter_scales", "edit", "outpaint", "check", "warmup", "decode", "encode", "choose"),
    *("measure", "parse", "for_size", "Guidance", "Sampling", "weights", "greedy", "probabilities", "sample", "open"),
    *("file", "graph", "CostRow"),
)
CALLED = {("on_scale", kind) for kind in ("type", "function")} | {("on_row", kind) for kind in ("type", "function")}
OF_PICTURES = {"image", "mask"}  # tests/runtime/pictures has their variants


@pytest.mark.parametrize("name", NAMES)
def test_wrong_types(pipe: FlexVARPipeline, name: str) -> None:
    function, valid = functions(pipe)[name]
    for argument in valid.keys() - (OF_PICTURES if name in ("edit", "outpaint") else set()):
        for kind, value in WRONG.items():
            if (argument, kind) in CALLED:
                continue
            given = {key: each for key, each in valid.items() if each is not None or key == argument}
            try:
                function(**{**given, argument: value})  # some are valid, such as a large top_k
            except FlexVARError:
                continue
            except Exception as error:
                pytest.fail(f"{argument} is {kind}: {type(error).__name__}: {error}")


def test_all_functions_are_tested(pipe: FlexVARPipeline) -> None:
    assert set(NAMES) == set(functions(pipe))


@pytest.mark.parametrize(
    "arguments", [{"keep_decoded": 1}, {"keep_decoded": np.array([True, False])}, {"on_scale": 5}, {"labels": {1, 2}}]
)
def test_they_are_invalid_input(pipe: FlexVARPipeline, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(arguments)).replace("labels", "class")):
        pipe(**{"labels": [0], "schedule": "1", **arguments})


@pytest.mark.parametrize("call", ["warmup", "choose_schedule", "measure_costs"])
def test_absurd_counts_are_refused_at_once(pipe: FlexVARPipeline, call: str) -> None:
    arguments: dict[str, Any] = {
        "warmup": {"batch_sizes": [10**12]},
        "choose_schedule": {"images": 10**12, "deadline_ms": 5},
        "measure_costs": {"repeats": 10**12},
    }[call]
    with pytest.raises(InvalidInput, match="from 1 to"):
        getattr(pipe, call)(**arguments)
