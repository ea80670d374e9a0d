"""Compares the kernels of a profiled generation on the backend `cuda` with the bounds of the time model.

A library names its kernels as it likes. So each of its kernels is found by its place between kernels of ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from flexvar_runtime import ScaleSchedule

from ..time_model import GPUS, Decoder, Work, generation
from .kernel_classes import COPIES, OURS, Kernel, classify
from .rows_and_goals import published


@dataclass
class _Sum:
    """The launches of one kind, in microseconds."""

    launches: int = 0
    us: float = 0.0
    bound_us: float = 0.0
    expected_us: float = 0.0


def expected_works(model: str, schedule: ScaleSchedule, batch: int, device: str) -> list[Work] | None:
    """The launches of a guided generation. None for a model or a GPU that the time model does not know."""
    facts, gpu = published(model), next((gpu for gpu in GPUS.values() if gpu.name == device), None)
    return None if facts is None or gpu is None else generation(facts, Decoder(), schedule, batch, gpu)


def compare_kinds(kernels: Sequence[Kernel], works: Sequence[Work]) -> dict[str, Any]:
    """The launches, the time, the bound and the expected time of each kind, the most expensive first.

    kernels, works: of one generation, in order. Kernels that two neighbouring products of a library share are one kind.
    A trace with other kernels of ours than the model expects gives a reason.
    """
    measured, expected = _segments_of_kernels(kernels), _segments_of_works(works)
    names, wanted = [name for name, _, _ in measured], [name for name, _, _ in expected]
    if names != wanted:
        place = next((i for i, (a, b) in enumerate(zip(names, wanted, strict=False)) if a != b), None)
        where = f"{len(names)} kernels of ours, not {len(wanted)}"
        if place is not None:
            where = f"{names[place]} in the place of {wanted[place]}, as number {place + 1} of ours"
        return {"reason": f"not measured: the profile has {where}"}
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for (_, own, launched), (_, work, between) in zip(measured, expected, strict=True):
        pairs = [([own], [work])] if own is not None and work is not None else []
        if len(launched) == len(between):
            pairs += [(kernel, [one]) for kernel, one in zip(launched, between, strict=True)]
        elif launched or between:
            pairs.append(([kernel for each in launched for kernel in each], between))
        for timed, modelled in pairs:
            kind = " + ".join(name for name, _ in groupby(work.kind for work in modelled)) or "not expected"
            found = sums[kind]
            found.launches += max((len(modelled), 1))
            found.us += sum(kernel.duration for kernel in timed)
            found.bound_us += sum(work.bound_us for work in modelled)
            found.expected_us += sum(work.us for work in modelled)
    rows = [
        {
            "kind": kind,
            "launches": found.launches,
            "us": found.us,
            "bound_us": found.bound_us,
            "expected_us": found.expected_us,
            "times_bound": found.us / found.bound_us if found.bound_us else None,
        }
        for kind, found in sums.items()
    ]
    return {"kinds": sorted(rows, key=lambda row: -row["us"])}


def _segments_of_kernels(kernels: Sequence[Kernel]) -> list[tuple[str, Kernel | None, list[list[Kernel]]]]:
    """Kernels of ours, each with those of libraries that follow it. A product may be a kernel and a reduction."""
    segments: list[tuple[str, Kernel | None, list[list[Kernel]]]] = [("", None, [])]
    for kernel in kernels:
        following = segments[-1][2]
        if kernel.name in OURS:
            segments.append((kernel.name, kernel, []))
        elif classify(kernel.name) == COPIES:  # a copy or a fill, of the loop or of a library
            continue
        elif following and "reduce" in kernel.name.lower():
            following[-1].append(kernel)
        else:
            following.append([kernel])
    return segments


def _segments_of_works(works: Sequence[Work]) -> list[tuple[str, Work | None, list[Work]]]:
    segments: list[tuple[str, Work | None, list[Work]]] = [("", None, [])]
    for work in works:
        if work.name in OURS:
            segments.append((work.name, work, []))
        elif work.name.startswith(("product", "convolution")):
            segments[-1][2].append(work)
    return segments
