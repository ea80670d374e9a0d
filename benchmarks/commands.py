"""`flexvar bench`: run, report, compare and model. Heavy imports wait until a command runs."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexvar_runtime.checks import check_choice, check_whole
from flexvar_runtime.cli.console import JsonOption, emit, err, out, say
from flexvar_runtime.cli.options import AllowUnproved
from flexvar_runtime.errors import InvalidInput
from flexvar_runtime.model.schedule import PUBLISHED

if TYPE_CHECKING:
    from .comparison import Change
    from .records import Measured
    from .session import Outcome

DEFAULT_VARIANTS = "ort-cpu"
PEERS = "torch-eager, torch-bf16, torch-compile, ort-plain, openvino-plain"
EACH = "Give it once for each bundle, in their order. A dash (-) means none."


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure latency and throughput, and compare runs.", no_args_is_help=True)
    for command in (run, report, compare, model, load):
        bench.command()(command)
    app.add_typer(bench, name="bench")


def run(
    bundles: Annotated[list[Path] | None, typer.Argument(help="Bundle directories.", show_default=False)] = None,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write the results to, as JSON lines.")],
    suite: Annotated[
        Path | None,
        typer.Option(help="TOML file that lists the models and what to measure of each. Pass it instead of bundles."),
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help=f"Name of the model in the results. {EACH}")] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help=f"Transformer checkpoint of the bundle, for the torch variants. {EACH}")
    ] = None,
    vae: Annotated[
        list[str] | None, typer.Option(help=f"Tokenizer checkpoint of the bundle, for the torch variants. {EACH}")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help=f"ema or model, for a checkpoint that holds both. {EACH}")
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(help=f"JSON file with the image quality of each schedule, for a chart. {EACH}"),
    ] = None,
    variants: Annotated[
        str,
        typer.Option(help=f"What to measure, separated by commas: backends, and for comparison {PEERS}."),
    ] = DEFAULT_VARIANTS,
    step_counts: Annotated[
        str, typer.Option("--steps", help="Numbers of scales, from 4 to 10, separated by commas.")
    ] = "10,8,6,4",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,2",
    repeats: Annotated[int, typer.Option(min=1, help="Measured calls of each variant. Use 80 to compare results.")] = 7,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Time limit for each number of scales and batch size. Each variant runs at least three times."
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=0, help="Number of requests of each load test. 0 skips the load tests.")
    ] = 20,
    costs: Annotated[
        bool,
        typer.Option("--costs/--no-costs", help="Also measure the times that --deadline-ms needs, and save them."),
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of CPU threads of each variant.")] = None,
    allow_unproved: AllowUnproved = False,
    append: Annotated[bool, typer.Option("--append", help="Add the results to the file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency and throughput of bundles.

    The peak speed of the machine is measured first. Then all variants are measured in turn, each in its own process.
    """
    from flexvar_runtime.backends.host_arrays import MAX_THREADS
    from flexvar_runtime.files.targets import check_files, require_writable
    from flexvar_runtime.machine.processors import default_threads

    from .session import run_session
    from .suite import from_options, read_suite
    from .workload import Extent

    if append and force:
        raise InvalidInput("--append cannot be combined with --force.", expected="one of them", fix="Use one of them.")
    if suite is not None and any((bundles, name, checkpoint, vae, weights, quality)):
        raise InvalidInput(
            "--suite cannot be combined with bundles, --name, --checkpoint, --vae, --weights or --quality.",
            expected="a suite, or bundles",
            fix="Add the bundle to the suite, or leave out --suite.",
        )
    check_files([output], append or force)
    require_writable(Path(os.path.abspath(output)).parent)
    if threads is not None:
        check_whole("threads", threads, 1, MAX_THREADS)
    entries = (
        read_suite(suite)
        if suite is not None
        else from_options(
            bundles or [],
            names=name or [],
            checkpoints=checkpoint or [],
            vaes=vae or [],
            weights=weights or [],
            quality=quality or [],
            allow_unproved=allow_unproved,
        )
    )
    options = Extent(
        variants=tuple(part.strip() for part in variants.split(",") if part.strip()),
        steps=_numbers(step_counts, "--steps"),
        batches=_numbers(batches, "--batches"),
        repeats=repeats,
        seconds=math.inf if seconds is None else seconds,
        requests=requests,
    )
    outcome = run_session(
        entries,
        options,
        output,
        threads=threads or default_threads(),
        costs=costs,
        append=append,
        allow_unproved=allow_unproved,
    )
    data = {
        "results": str(output),
        "models": [entry.name for entry in entries],
        "records": len(outcome.made),
        "costs": [asdict(one) for one in outcome.costs],
    }
    emit(data, as_json, lambda: _show(output, outcome))


def report(
    results: Annotated[Path, typer.Argument(help="File of results.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write report.html and the charts to.")],
    as_json: JsonOption = False,
) -> None:
    """Write results as one HTML page with charts, and the charts as PNG files."""
    from flexvar_runtime.files.targets import make_writable

    from .records import read
    from .report_page import write_report

    make_writable(output)
    files = write_report(read(results), output)
    emit({"files": [str(file) for file in files]}, as_json, lambda: say("\n".join(map(str, files))))


def compare(
    before: Annotated[Path, typer.Argument(help="File of results.")],
    after: Annotated[Path, typer.Argument(help="File of results of the same scenarios.")],
    as_json: JsonOption = False,
) -> None:
    """Show which times changed between two runs by more than the noise. The exit code is 0 in any case."""
    from rich.table import Table

    from .comparison import compare as compared
    from .comparison import spread, unmatched, warnings
    from .records import read

    first, second = read(before), read(after)
    changes, doubts, only = compared(first, second), warnings(first, second), unmatched(first, second)
    rows = [row for results in (first, second) for row in results.measured if row.seconds]
    spreads = [value for value in map(spread, rows) if value is not None]

    def show() -> None:
        table = Table("scenario", "variant", "before ms", "after ms", "ratio", "from", "to", "verdict")
        for change in changes:
            table.add_row(
                change.scenario.name,
                change.scenario.variant,
                f"{change.before * 1e3:.1f}",
                f"{change.after * 1e3:.1f}",
                *(f"{value:.3f}" for value in (change.ratio, change.low, change.high)),
                change.verdict,
            )
        out.print(table)
        if spreads:
            say(f"spread from repeat to repeat: {min(spreads):.1%} to {max(spreads):.1%}")
        for text in (*doubts, *only):
            say(text)

    data = {
        "changes": [_json_values(change) for change in changes],
        "spread": {"least": min(spreads), "most": max(spreads)} if spreads else None,
        "warnings": list(doubts),
        "unmatched": list(only),
    }
    emit(data, as_json, show)


def model(
    *,
    depth: Annotated[int, typer.Option(min=1, max=256, help="Blocks of the model: 16, 20 or 24 as published.")] = 16,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images of a generation.")] = 1,
    schedule: Annotated[str, typer.Option(help="Scales of a generation, such as 1_2_4_8_16.")] = PUBLISHED["10"],
    gpu: Annotated[str, typer.Option(help="One of h200, h100, a100 and rtx4090.")] = "h200",
    as_json: JsonOption = False,
) -> None:
    """Predict the time of a guided generation on the backend cuda. Nothing is measured.

    The table shows each kind of launch with its least time, the bound, and its expected time. Only the figures of the
    H200 rest on measured products and convolutions.
    """
    from rich.table import Table

    from flexvar_runtime import ScaleSchedule
    from flexvar_runtime.model.facts import ModelFacts

    from .time_model import DECODER, GPUS, SAMPLING, TRANSFORMER, Decoder, by_kind, generation, total

    check_choice("--gpu", gpu, tuple(GPUS))
    scales = ScaleSchedule.parse(schedule)
    works = generation(ModelFacts.published(depth), Decoder(), scales, batch, GPUS[gpu])
    kinds = by_kind(works)
    sums = [total("all", part, [w for w in works if w.part == part]) for part in (TRANSFORMER, SAMPLING, DECODER)]
    sums.append(total("all", "generation", works))

    def show() -> None:
        whole, source = sums[-1], "measured on it" if GPUS[gpu].measured else "scaled by data sheets"
        say(
            f"Predicted: {whole.us / 1e3:.1f} ms (at least {whole.bound_us / 1e3:.1f}) for a batch of {batch}, "
            f"d{depth} in half precision, {len(scales)} scales, {GPUS[gpu].name}. Rates {source}."
        )
        columns = ("part", "launches", "count", "MB", "GFLOP", "bound ms", "expected ms")
        table = Table(*columns, box=None, padding=(0, 1, 0, 0))
        for work in (*kinds, *sums):
            moved, times = (work.read + work.written) / 1e6, (work.bound_us / 1e3, work.us / 1e3)
            cells = f"{moved:.1f}", f"{work.flops / 1e9:.1f}", *(f"{time:.3f}" for time in times)
            table.add_row(work.part, work.kind, str(work.count), *cells)
        out.print(table)

    request = {"gpu": GPUS[gpu].name, "depth": depth, "batch": batch, "schedule": str(scales)}
    total_ms = {"expected_ms": sums[-1].us / 1e3, "bound_ms": sums[-1].bound_us / 1e3}
    parts = {"kinds": [*map(asdict, kinds)], "sums": [*map(asdict, sums)]}
    emit({**request, **total_ms, **parts}, as_json, show)


def load(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    *,
    scenarios: Annotated[
        str, typer.Option(help="Some of throughput, steady, overload, idle, loris and aborted, joined by commas.")
    ] = "throughput",
    clients: Annotated[int, typer.Option(min=1, help="Clients that send one request after another.")] = 16,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of each part of a scenario.")] = 10.0,
    turns: Annotated[int, typer.Option(min=1, help="How often service and bare pipeline take turns.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure a service: start flexvar serve on this machine, and send it requests.

    throughput compares it with a bare pipeline, in turns. The other scenarios send too many requests, hold idle and
    slow connections, or close connections at random moments.
    """
    from .load import SCENARIOS, measure

    wanted = [name.strip() for name in scenarios.split(",")]
    for one in wanted:
        check_choice("--scenarios", one, SCENARIOS)
    found = measure(bundle, wanted, clients, seconds, turns, lambda line: say(line, err))

    def show() -> None:
        for one, values in found.items():
            say(one)
            for key, value in values.items():
                say(f"  {key.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"  {key}: {value}")

    emit(found, as_json, show)


def _json_values(change: Change) -> dict[str, Any]:
    """A change as JSON values. An infinite bound becomes null, because JSON has no infinity."""
    values = asdict(change)
    return {name: None if value == math.inf else value for name, value in values.items()}


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInput(
            f"{option} {text!r:.100} is not a list of whole numbers.",
            expected="numbers separated by commas",
            fix=f"Separate them by commas: {option} 8,6,4",
        ) from None


def _show(output: Path, outcome: Outcome) -> None:
    from rich.table import Table

    from .records import Measured, Served
    from .timing import quantiles

    table = Table("scenario", "variant", "median ms", "p10", "p90", "images/s", "peak MB", "", box=None)
    for record in outcome.made:
        if isinstance(record, Measured):
            table.add_row(record.scenario.name, record.scenario.variant, *_cells(record))
    out.print(table)
    for record in outcome.made:
        if isinstance(record, Served):
            times = quantiles(record.latencies)
            say(
                f"{record.scenario.name}, {record.mode}: median {times['median'] * 1e3:.0f} ms, p90 "
                f"{times['p90'] * 1e3:.0f} ms, {record.images_per_second:.2f} images/s"
            )
    for one in outcome.costs:
        text = one.note or f"{one.rows} schedules and batch sizes, {one.file}"
        say(f"costs of {one.model} on {one.backend}: {text}")
    say(f"Results: {output}. Draw them with: {shlex.join(['flexvar', 'bench', 'report', str(output)])} -o DIR")


def _cells(record: Measured) -> list[str]:
    from .timing import quantiles

    if not record.seconds:
        return ["", "", "", "", "", record.note]
    times = quantiles(record.seconds)
    peak = "" if record.peak_memory_bytes is None else f"{record.peak_memory_bytes / 1e6:.0f}"
    rate = record.scenario.batch / times["median"]
    return [*(f"{times[key] * 1e3:.1f}" for key in ("median", "p10", "p90")), f"{rate:.2f}", peak, record.note]
