"""The content of a result: one row for each measurement, with its limit, and the goals with what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flexvar_runtime import ScaleSchedule
from flexvar_runtime.bundle.manifest import PLAIN
from flexvar_runtime.model.facts import ModelFacts

from ..limits import generation_limit
from .processes import DONE, NOT_MEASURED

SCHEMA = 1
REFERENCE, COMPILED = "flexvar_ref", "torch.compile"
PEERS = (REFERENCE, COMPILED, "torch-modules")
MEASURED = ("run", "proof", "reference", "compiled")  # jobs whose rows are times of whole generations
MAIN = "d16"  # the goals are for it
AS_PUBLISHED = f"{REFERENCE} autocast-fp16"
CUDA = "cuda"  # the backend with our own kernels, which has goals of its own
CUDA_WALL_MS = {1: 9.5, 8: 25.0, 64: 165.0}  # of MAIN, by batch
TIMES_BOUND = 2.0  # what a kernel of the backend cuda may take
COMPILED_BATCHES = (8, 64)
GOALS = {
    **{f"{CUDA} {MAIN} B={batch} wall ms": most for batch, most in CUDA_WALL_MS.items()},
    f"{MAIN} B=1 wall ms": 8.0,
    "times faster than the reference as published": 8.0,
    "times faster than torch.compile": 1.0,
    **{f"times faster than torch.compile, B={batch}": 1.0 for batch in COMPILED_BATCHES},
    f"{MAIN} B=64 images/s": 400.0,
    "sampling share": 0.05,
    "resident bytes grown in the second half": 4 * 2**20,
    "device bytes grown": 2 * 2**20,  # the driver allocates in such blocks
}
Records = Mapping[str, Mapping[str, Any]]


def published(model: str) -> ModelFacts | None:
    """Sizes of "d16" and the like; None for other models."""
    match = re.fullmatch(r"d([0-9]+)", model)
    return None if match is None else ModelFacts.published(int(match[1]))


def results(records: Records, job: str) -> Iterator[Mapping[str, Any]]:
    """The results of the phases of a job, complete or partial."""
    for name, record in records.items():
        if name.split()[0] == job and record["result"]:
            yield record["result"]


def measured_precision(result: Mapping[str, Any]) -> str:
    """The precision of the graphs that were run. Where none was run: the precision that was asked for.

    The tiny model does not count, because a stage runs it in several precisions.
    """
    for job in ("run", "proof"):
        for found in results(result["phases"], job):
            if "precision" in found:
                return str(found["precision"])
    return str(result["options"].get("precision", "fp16"))


def rows(records: Records) -> list[dict[str, Any]]:
    """One row for each measured batch of each side.

    share_of_limit: the strict limit as a share of the time, None where the rates of the machine are unknown. left_out:
    why the row does not count towards the goals.
    """
    found = []
    for result in (result for job in MEASURED for result in results(records, job)):
        for row in result.get("rows", ()):
            if "wall_s" not in row:
                continue
            side = result.get("backend") or (f"{REFERENCE} {row['variant']}" if "variant" in row else COMPILED)
            measured = (row["device_s"] or row["wall_s"])["median"]
            limit = _limit(records, result["model"], result["schedule"], row["batch"])
            reason = _left_out(result)
            found.append(
                {
                    "side": side + (f" {row['shapes']}" if "shapes" in row else ""),
                    "device": result["device"],
                    "precision": result.get("precision") or row["variant"],
                    "decoder": result.get("decoder", PLAIN),
                    "model": result["model"],
                    "batch": row["batch"],
                    "wall_ms": 1e3 * row["wall_s"]["median"],
                    "device_ms": 1e3 * row["device_s"]["median"] if row["device_s"] else None,
                    "images_per_second": row["images_per_second"],
                    "joules_per_image": row.get("joules_per_image"),
                    "mode": row.get("mode"),
                    "decoder_included": row["decoder_included"],
                    "warmup": row["warmup"],
                    "samples": row["samples"],
                    "peak_bytes": (row.get("device_memory_bytes") or {}).get("peak"),
                    "limit": limit,
                    "share_of_limit": limit["strict_s"] / measured if limit else None,
                    "left_out": reason,
                }
            )
    return found


def _left_out(result: Mapping[str, Any]) -> str | None:
    """Why a result does not count: a graph is outside its gate, or the compiled peer is. None if it counts."""
    if "backend" in result and not result.get("parity", {}).get("passed"):
        return "parity failed"
    error, gate = result.get("relative_error", 0.0), result.get("gate", 0.0)
    return None if error <= gate else f"relative error {error:.3g}, gate {gate:g}"


def _limit(records: Records, model: str, schedule: str, batch: int) -> dict[str, float] | None:
    facts, rates = published(model), _rates(records)
    if facts is None or rates is None:
        return None
    bandwidth, rate = rates
    parsed = ScaleSchedule.parse(schedule)
    limit = generation_limit(facts, parsed, batch, guided=True, bytes_per_second=bandwidth, flops_per_second=rate)
    return limit.to_json()


def _rates(records: Records) -> tuple[float, float] | None:
    rates: Mapping[str, Any] = next((result.get("rates", {}) for result in results(records, "machine")), {})
    if "copy_bytes_per_second" not in rates:
        return None
    return rates["copy_bytes_per_second"], rates["gemm_flops_per_second"]


def goals(records: Records, model: str, flat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with what was measured. held: None where nothing was measured. Rows that are left out do not count."""
    flat = [row for row in flat if row["left_out"] is None]
    right = {(r["backend"], r["model"]) for r in results(records, "run") if not _left_out(r)}
    best = {batch: _best(flat, model, batch) for batch in (1, 64)}
    single = best[1]["wall_ms"] if best[1] else None
    peers = {
        "the reference as published": _least(flat, model, 1, AS_PUBLISHED),
        "torch.compile": _least(flat, model, 1, COMPILED),
    }
    found = [
        _goal(f"{CUDA} {MAIN} B={batch} wall ms", _least(flat, MAIN, batch, CUDA), at_most=True)
        for batch in CUDA_WALL_MS
    ]
    found += _bounds(records)
    found.append(_goal(f"{MAIN} B=1 wall ms", single if model == MAIN else None, at_most=True))
    for name, theirs in peers.items():
        found.append(_goal(f"times faster than {name}", theirs / single if theirs and single else None))
    for batch in COMPILED_BATCHES:
        ours, compiled = _best(flat, model, batch), _least(flat, model, batch, COMPILED)
        faster = compiled / ours["wall_ms"] if ours and compiled else None
        found.append(_goal(f"times faster than torch.compile, B={batch}", faster))
    many = best[64]["images_per_second"] if best[64] and model == MAIN else None
    found.append(_goal(f"{MAIN} B=64 images/s", many))
    shares = [
        row["classes"]["sampling"]["share"]
        for result in results(records, "profile")
        for row in result.get("rows", ())
        if "sampling" in row.get("classes", ()) and (result["backend"], result["model"]) in right
    ]
    found.append(_goal("sampling share", max(shares, default=None), at_most=True))
    for name, key in (
        ("resident bytes grown in the second half", "resident_grown_bytes_second_half"),
        ("device bytes grown", "device_grown_bytes"),
    ):
        grown = [
            value
            for result in results(records, "growth")
            if (value := result.get(key)) is not None and (result["backend"], result["model"]) in right
        ]
        found.append(_goal(name, max(grown, default=None), at_most=True))
    parities = [result["parity"] for job in ("tiny", "run") for result in results(records, job) if "parity" in result]
    found.append(_yes("every graph within its gate", [parity["passed"] for parity in parities]))
    forced = [parity["teacher_forced_tokens"]["holds"] for parity in parities]
    found.append(_yes("teacher-forced tokens equal where the draw decides", forced))
    found += _captured(records)
    kernels = list(results(records, "kernels"))
    found.append(
        _yes("draws equal the host's", [k["draws_equal_host"]["holds"] for k in kernels if "draws_equal_host" in k])
    )
    sampled = [row["holds"] for k in kernels for row in k.get("tokens_equal_host", ())]
    found.append(_yes("tokens of equal logits equal the host's", sampled))
    return found


def _bounds(records: Records) -> list[dict[str, Any]]:
    """How many kinds of kernels take at most twice their bound, for each profiled batch of the backend cuda."""
    compared = {
        row["batch"]: [kind["times_bound"] <= TIMES_BOUND for kind in row["bounds"]["kinds"] if kind["times_bound"]]
        for result in results(records, "profile")
        for row in result.get("rows", ())
        if result["backend"] == CUDA and result["model"] == MAIN and "kinds" in row.get("bounds", ())
    }
    name = f"kinds of kernels within {TIMES_BOUND:g} times their bound"
    return [_yes(f"{name}, B={batch}", compared.get(batch, [])) for batch in CUDA_WALL_MS]


def _captured(records: Records) -> list[dict[str, Any]]:
    """Goals of the backend cuda: one CUDA graph, equal results again and scale by scale, and plans of cuDNN."""
    ours = [
        result
        for job in ("tiny", "run")
        for result in results(records, job)
        if result.get("backend") == CUDA and "parity" in result
    ]
    modes = [mode for result in ours for mode in _modes(result)]
    parities = [result["parity"] for result in ours]
    repeats = [parity["again_equal"] == parity["scale_by_scale_equal"] == 1 for parity in parities]
    plans = [not result["substituted"] for result in ours if "substituted" in result]
    return [
        _yes("cuda runs as one CUDA graph", [mode == "cuda-graph" for mode in modes]),
        _yes("cuda gives the same again, and scale by scale", repeats),
        _yes("cuda needs no im2col in the place of cuDNN", plans),
    ]


def _modes(result: Mapping[str, Any]) -> list[str]:
    """How each generation ran. A row of times has several modes if they differed."""
    rows = (row["mode"] for row in result.get("rows", ()) if row.get("mode"))
    return [*result.get("mode", ()), *(mode for modes in rows for mode in modes)]


def _goal(name: str, value: float | None, *, at_most: bool = False) -> dict[str, Any]:
    bound = GOALS[name]
    held = None if value is None else (value <= bound if at_most else value >= bound)
    return {"goal": name, "measured": value, "at_most" if at_most else "at_least": bound, "held": held}


def _yes(name: str, holds: Sequence[bool]) -> dict[str, Any]:
    return {"goal": name, "measured": f"{sum(holds)} of {len(holds)}", "held": all(holds) if holds else None}


def _best(flat: Sequence[Mapping[str, Any]], model: str, batch: int) -> Mapping[str, Any] | None:
    """The fastest of our backends on a GPU."""
    rows = [row for row in flat if (row["model"], row["batch"]) == (model, batch) and row["device"] != "cpu"]
    ours = (row for row in rows if not row["side"].startswith(PEERS))
    return min(ours, key=lambda row: row["wall_ms"], default=None)


def _least(flat: Sequence[Mapping[str, Any]], model: str, batch: int, side: str) -> float | None:
    rows = [row for row in flat if (row["model"], row["batch"]) == (model, batch)]
    times = [row["wall_ms"] for row in rows if row["side"].startswith(side) and row["device"] != "cpu"]
    return min(times, default=None)


def document(facts: Mapping[str, Any], records: Records, model: str) -> dict[str, Any]:
    """The whole result. facts: when it was measured, with which options and from which sources."""
    flat = rows(records)
    return {
        "schema": SCHEMA,
        **facts,
        "gpu": _gpu(records),
        "goals": goals(records, model, flat),
        "rows": flat,
        "phases": dict(records),
    }


def _gpu(records: Records) -> str | None:
    return next((result["torch"]["gpu"] for result in results(records, "machine")), None)


def headline(result: Mapping[str, Any]) -> dict[str, Any]:
    """The most important numbers, which are printed as one line of JSON."""
    states: dict[str, list[str]] = {}
    for name, record in result["phases"].items():
        states.setdefault(record["status"], []).append(name)
    return {
        "gpu": result["gpu"],
        "minutes": result["minutes_taken"],
        **{status: len(names) for status, names in states.items()},
        "goals": {goal["goal"]: {"measured": goal["measured"], "held": goal["held"]} for goal in result["goals"]},
        "wall_ms": {
            f"{row['side']} {row['model']} B={row['batch']}": round(row["wall_ms"], 3)
            for row in result["rows"]
            if row["left_out"] is None
        },
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the rows, the goals, and the phases that are not done."""
    table = Table("side", "model", "B", "wall ms", "device ms", "images/s", "J/image", "of limit", "peak GB", "mode")
    table.title = f"{result['gpu'] or 'no GPU: times of a CPU'}, medians, decoder included"
    for row in result["rows"]:
        share, device, peak = row["share_of_limit"], row["device_ms"], row["peak_bytes"]
        mode, joules = row["mode"], row.get("joules_per_image")
        table.add_row(
            row["side"],
            row["model"],
            str(row["batch"]),
            f"{row['wall_ms']:.2f}",
            "–" if device is None else f"{device:.2f}",
            f"{row['images_per_second']:.0f}",
            "–" if joules is None else f"{joules:.1f}",
            "–" if share is None else f"{share:.0%}",
            "–" if peak is None else f"{peak / 1e9:.1f}",
            ", ".join(mode) if isinstance(mode, list) else mode or "eager",
        )
    console.print(table)
    for row in result["rows"]:
        if row["left_out"]:
            what = f"{row['side']} {row['model']} B={row['batch']}"
            console.print(f"{what}: left out of the goals: {row['left_out']}", highlight=False, markup=False)
    for found in results(result["phases"], "decoders"):
        for row in found["rows"]:
            what = f"{found['backend']} {found['model']} B={row['batch']}, decoder alone, {row['decoder']}"
            seconds = (row["device_s"] or row["wall_s"])["median"]
            console.print(f"{what}: {1e3 * seconds:.2f} ms", highlight=False, markup=False)
    for found in results(result["phases"], "run"):
        what = f"{found['backend']} {found['model']}"
        for part in found.get("parts", ()):
            decoder, rest = 1e3 * part["decoder_s"], 1e3 * part["transformer_and_sampling_s"]
            text = f"{what} B={part['batch']}: decoder {decoder:.2f} ms, transformer and sampling {rest:.2f} ms"
            console.print(text, highlight=False, markup=False)
        for slow in found.get("substituted", ()):
            console.print(f"{what}: im2col in the place of cuDNN: {slow}", highlight=False, markup=False)
    for goal in result["goals"]:
        state = {True: "holds", False: "MISSED", None: "not measured"}[goal["held"]]
        bound = next((f", {key.replace('_', ' ')} {goal[key]:g}" for key in ("at_most", "at_least") if key in goal), "")
        console.print(f"{goal['goal']}: {goal['measured']} ({state}{bound})", highlight=False, markup=False)
    for name, record in result["phases"].items():
        if record["status"] != DONE:
            state = "" if record["status"] == NOT_MEASURED else f"{record['status']}: "
            console.print(f"{name}: {state}{record['reason']:.300}", highlight=False, markup=False, soft_wrap=True)
