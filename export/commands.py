"""The commands `flexvar export` and `flexvar verify`. Heavy modules are imported when a command runs."""

from __future__ import annotations

import importlib
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexvar_runtime.backends import CPU_BACKENDS, TENSORRT_BACKENDS
from flexvar_runtime.checks import check_choice
from flexvar_runtime.cli import options
from flexvar_runtime.cli.console import JsonOption, emit, out, say, steps
from flexvar_runtime.errors import ArtifactRefused, BackendUnavailable, InvalidInput, ParityFailed
from flexvar_runtime.files.atomic import already_exists
from flexvar_runtime.files.reading import read_small
from flexvar_runtime.files.strict_json import encode, loads
from flexvar_runtime.files.targets import require_utf8, require_writable
from flexvar_runtime.model.signatures import GRAPHS

from .build_command import build

if TYPE_CHECKING:
    from flexvar_runtime.bundle.manifest import ParityRecord
    from flexvar_runtime.bundle.opening import Bundle
    from flexvar_runtime.model.facts import ModelFacts

WEIGHTS = ("ema", "model")
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="Weights to take from a checkpoint that holds both: ema (averaged) or model."),
]
CHECKPOINT_HELP = "a PyTorch file such as .pth, .safetensors, or the index or folder of a sharded checkpoint."
EXPORT_STEPS = 4 + len(GRAPHS)  # checkpoint, reference, activations, proof, and one for each graph


def register(app: typer.Typer) -> None:
    """Add the commands of this package to the command line."""
    for command in (export, build, verify):
        app.command()(command)


def _require_torch() -> None:
    """Raise BackendUnavailable unless the modules of the export extra are installed."""
    try:
        for name in ("onnx", "onnxscript", "safetensors", "torch"):
            importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"This command needs the module {error.name}, which is not installed.",
            expected="the export extra",
            fix="Run: pip install 'flexvar-deploy[cpu,export]'",
        ) from error


def export(
    checkpoint: Annotated[Path, typer.Argument(help=f"Transformer: {CHECKPOINT_HELP}")],
    vae: Annotated[Path, typer.Option(help=f"Tokenizer: {CHECKPOINT_HELP}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle directory to write.")],
    precision: Annotated[
        str, typer.Option(help="Number format: fp32, fp16, bf16, int8 or int8-bf16. See docs/precision.md.")
    ] = "fp32",
    float32: Annotated[
        str,
        typer.Option(help="Parts to keep in float32, such as blocks.0.mlp, or none. auto keeps as few as are needed."),
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="Device to export for: cpu, gpu, or auto, which is gpu for fp16 and cpu otherwise.")
    ] = "auto",
    decoder: Annotated[
        str, typer.Option(help="How the decoder upsamples: plain, phases, transposed, or auto for the fastest.")
    ] = "auto",
    class_names: Annotated[
        Path | None, typer.Option(help="JSON file with a list of class names, in label order.")
    ] = None,
    defaults: Annotated[
        Path | None, typer.Option(help="JSON file with default options of the bundle, such as schedule and top_p.")
    ] = None,
    quality: Annotated[
        Path | None,
        typer.Option(help="JSON file with the image quality of each schedule, from which deadlines choose."),
    ] = None,
    weights: WeightsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle of ONNX graphs and tables, and compare it with the PyTorch reference."""
    for option, path in (("CHECKPOINT", checkpoint), ("--vae", vae)):
        if not os.path.exists(path):  # checked before torch is imported, which takes seconds
            got, fix = f"{option}: there is no file {path}.", "Check the path."
            raise ArtifactRefused(got, expected="a checkpoint", fix=fix)
    _check_weights(weights)
    if os.path.lexists(output) and not force:
        raise already_exists(output)
    require_utf8(Path(os.path.abspath(output)), "ONNX")
    require_writable(Path(os.path.abspath(output)).parent)
    names = _read_class_names(class_names) if class_names else None
    _require_torch()
    from .bundle import export_bundle
    from .facts import PUBLISHED_DEFAULTS, read_defaults

    chosen = read_defaults(defaults) if defaults else PUBLISHED_DEFAULTS
    order = _read_order(quality, chosen.schedule) if quality else ()
    with steps(EXPORT_STEPS, "export") as progress:
        bundle = export_bundle(
            checkpoint,
            vae,
            output,
            precision=precision,
            class_names=names,
            force=force,
            threads=threads,
            float32_parts=_float32_parts(float32),
            defaults=chosen,
            quality_order=order,
            target=target,
            decoder=decoder,
            weights=weights,
            progress=progress,
        )
    size = sum(record.size for record in bundle.manifest.files.values())
    record = bundle.manifest.parity
    data = {
        "bundle": str(output),
        "sha256": bundle.sha256,
        "precision": precision,
        "float32_parts": list(bundle.manifest.float32_parts),
        "decoder": bundle.manifest.decoder,
        "size_bytes": size,
        "parity": encode(record),
    }

    def show() -> None:
        say(f"{output}: {precision}, {size / 1e6:.1f} MB, sha256 {bundle.sha256}")
        if bundle.manifest.float32_parts:
            say(f"kept in float32: {', '.join(bundle.manifest.float32_parts)}")
        _show_record(record)

    emit(data, as_json, show)


def _check_weights(weights: str | None) -> None:
    if weights is not None:
        check_choice("--weights", weights, WEIGHTS)


def _float32_parts(text: str) -> tuple[str, ...] | None:
    """The names in `--float32`, or None for auto."""
    if text == "auto":
        return None
    return () if text == "none" else tuple(text.split(","))


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    backend: Annotated[str, typer.Option(help="Backend to check. ort-cpu emulates bf16 in float32.")] = "ort-cpu",
    device: options.Device = None,
    engines: options.Engines = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Transformer to compare with. Without it, the outputs recorded in the bundle are used."),
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Tokenizer that belongs to --checkpoint.")] = None,
    weights: WeightsOption = None,
    against: Annotated[
        str | None, typer.Option(help="Backend to compare with instead of the reference: ort-cpu.")
    ] = None,
    threads: options.Threads = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a bundle agrees with the reference.

    If it does not, the exit code is 3 and the error names the first scale and output that diverge.
    """
    if against is not None and checkpoint is not None:
        raise InvalidInput(
            "--against cannot be combined with --checkpoint.", expected="one of them", fix="Leave one of them out."
        )
    if (checkpoint is None) != (vae is None):
        raise InvalidInput("--checkpoint and --vae belong together.", expected="both or none", fix="Pass both.")
    if weights is not None and checkpoint is None:
        raise InvalidInput("--weights has no effect without --checkpoint.", expected="both", fix="Pass --checkpoint.")
    _check_weights(weights)
    _require_torch()
    from flexvar_runtime import Bundle, Guidance, ScaleSchedule
    from flexvar_runtime.bundle.certificate import Certificate

    from .bundle import load_reference, torch_threads
    from .facts import model_facts
    from .parity import prove, require_parity
    from .proof import PROOF_FILE, Proof, make_proof

    opened = Bundle.open(bundle, allow_unproved=True)
    defaults = opened.manifest.defaults
    if checkpoint is not None and vae is not None:
        with torch_threads(threads):
            model, tokenizer = load_reference(checkpoint, vae, weights)
            _require_sizes(opened.manifest.model, model_facts(model, tokenizer))
            guidance = Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)
            proof = make_proof(model, tokenizer, ScaleSchedule.parse(defaults.schedule), guidance)
        del model, tokenizer
    else:
        with opened.unchanged():
            proof = Proof.load(opened.file(PROOF_FILE))
    if against is None:
        record = prove(opened, proof, backend, threads, device=device, engines=engines)
    else:
        from flexvar_runtime.backends import create

        from .cross_check import cross_check

        first = create(against, opened, threads=threads)
        theirs = threads if backend in (*CPU_BACKENDS, "auto") else None  # the others compute on a GPU
        second = create(backend, opened, device=device, threads=theirs, engines=engines)
        record = cross_check(opened, proof, first, second)
    certificate = Certificate.of(opened.manifest)
    data = {"bundle": opened.sha256, **certificate.to_json(), "parity": encode(record)}

    def show() -> None:
        _show_record(record)
        if record.passed and certificate.problem is not None:
            say(f"The bundle needs a new parity record. {certificate.problem} Export the bundle again.")

    if record.passed and backend in TENSORRT_BACKENDS:
        data["engines"] = _engine_precisions(opened, backend, device, engines)
    if record.passed or not as_json:
        emit(data, as_json, show)
    require_parity(record)


def _engine_precisions(bundle: Bundle, backend: str, device: str | None, engines: Path | None) -> dict[str, object]:
    """The types that the kernels of every engine compute in, as reported by the engines."""
    from .engine_inspection import inspect_engines

    reports = inspect_engines(bundle, backend, device=device, engines=engines)
    return {graph: encode(report) for graph, report in reports.items()}


def _require_sizes(bundle: ModelFacts, checkpoint: ModelFacts) -> None:
    """Raise ParityFailed unless the bundle and the checkpoint have the same sizes."""
    pairs = [
        (field.name, getattr(bundle, field.name), getattr(checkpoint, field.name))
        for field in fields(bundle)
        if field.name != "class_names"
    ]
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    if differ:
        raise ParityFailed(
            "The bundle and --checkpoint have different sizes: "
            + ", ".join(f"{name} is {got} and {expected}" for name, got, expected in differ)
            + ".",
            expected=", ".join(f"{name} {expected}" for name, _, expected in differ),
            fix="Pass the checkpoint that the bundle was made from.",
        )


def _read_order(path: Path, default: str) -> tuple[str, ...]:
    """The schedules of a table of quality that have the size of the default schedule, best first."""
    from flexvar_runtime import ScaleSchedule

    from .quality import best_first, read_quality

    return best_first(read_quality(path), ScaleSchedule.parse(default))


def _read_class_names(path: Path) -> tuple[str, ...]:
    fix = "Write a JSON list with one name for each class, in label order."
    try:
        names = loads(read_small(path, fix=fix), where=f"--class-names {path}", fix=fix)
    except ArtifactRefused as error:
        raise InvalidInput(error.got, expected=error.expected, fix=fix) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        got = f"--class-names {path} is not a list of names."
        raise InvalidInput(got, expected="a JSON list of names", fix=fix)
    return tuple(names)


def _show_record(record: ParityRecord) -> None:
    from rich import box
    from rich.table import Table

    title = f"parity on {record.backend}{', bf16 emulated in float32' if record.emulated else ''}"
    labels = {"relative_error": "rel. error", "psnr_db": "PSNR, dB"}  # short, so that a row fits in 80 columns
    columns = ("graph", "scale", "output", "metric", "value", "bound", "")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for row in record.rows:
        mark = "ok" if row.holds else "FAILED"
        metric = labels.get(row.metric, row.metric)
        table.add_row(row.graph, row.scale or "", row.output, metric, f"{row.value:.3g}", f"{row.bound:g}", mark)
    out.print(table)
    if record.free_running_agreement is not None:
        say(f"tokens equal to the reference in a free-running generation: {record.free_running_agreement:.2%}")
