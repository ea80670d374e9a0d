"""`flexvar export` and `flexvar verify`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexvar_runtime.backends import CPU_BACKENDS, TENSORRT_BACKENDS
from flexvar_runtime.cli.console import JsonOption, emit, out, steps
from flexvar_runtime.errors import ArtifactRefused, BackendUnavailable, InvalidInput, ParityFailed
from flexvar_runtime.files.atomic import already_exists
from flexvar_runtime.model.signatures import GRAPHS

from .build_command import build

if TYPE_CHECKING:
    from flexvar_runtime.bundle.manifest import ParityRecord
    from flexvar_runtime.bundle.opening import Bundle
    from flexvar_runtime.model.facts import ModelFacts

EXPORT_STEPS = 4 + len(GRAPHS)  # checkpoint, reference, activations and proof; each graph


def register(app: typer.Typer) -> None:
    for command in (export, build, verify):
        app.command()(command)


def _require_torch() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"no module {error.name}", expected="the export extra", fix="pip install 'flexvar-deploy[cpu,export]'"
        ) from error


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Transformer: a published .pth, or .safetensors with its .json.")],
    vae: Annotated[Path, typer.Option(help="Tokenizer: FlexVAE.pth, or .safetensors with its .json.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle directory to write.")],
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, bf16, int8 (the transformer's products in eight bits, for ort-cpu), or int8-bf16 (and "
            "the tokenizer in bf16, for ort-openvino)."
        ),
    ] = "fp32",
    float32: Annotated[
        str,
        typer.Option(
            help="What stays float32 where the rest is not: auto (the parts that rounding hurts most, where the gate "
            "asks for it), none, or names as in blocks.0.mlp,blocks.1.attention."
        ),
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(
            help="Device to export for: cpu, gpu or auto (gpu for fp16, else cpu). With gpu, an export fails if a node "
            "has no CUDA kernel."
        ),
    ] = "auto",
    decoder: Annotated[
        str,
        typer.Option(
            help="How the decoder upsamples: plain (as the reference), phases, transposed or auto. phases and "
            "transposed need fewer multiplications. auto is plain for gpu, transposed for int8-bf16, else phases."
        ),
    ] = "auto",
    class_names: Annotated[Path | None, typer.Option(help="JSON list of class names, in label order.")] = None,
    defaults: Annotated[
        Path | None,
        typer.Option(help="JSON object: schedule, guidance_scale, top_p, … where they are not the published ones."),
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="Quality by schedule (JSON): the order in which deadlines choose.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint to a bundle: graphs, tables, and the proof that they equal the reference."""
    for path in (checkpoint, vae):
        if not path.is_file():  # said before torch is imported, which takes seconds
            raise ArtifactRefused(f"no file {path}", expected="a checkpoint", fix="check the path")
    if output.exists() and not force:
        raise already_exists(output)
    _require_torch()
    from .bundle import export_bundle
    from .facts import PUBLISHED_DEFAULTS, read_defaults

    names = _read_class_names(class_names) if class_names else None
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
        "parity": _summary(record),
    }

    def show() -> None:
        out.print(
            f"{output}: {precision}, {size / 1e6:.1f} MB, sha256 {bundle.sha256}", highlight=False, soft_wrap=True
        )
        if bundle.manifest.float32_parts:
            out.print(f"kept in float32: {', '.join(bundle.manifest.float32_parts)}", highlight=False, soft_wrap=True)
        _show_record(record)

    emit(data, as_json, show)


def _float32_parts(text: str) -> tuple[str, ...] | None:
    if text == "auto":
        return None
    return () if text == "none" else tuple(text.split(","))


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    backend: Annotated[str, typer.Option(help="Backend to prove.")] = "ort-cpu",
    device: Annotated[str | None, typer.Option(help="GPU to use: cuda or cuda:N.")] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Directory of flexvar build's engines, if not in the bundle.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Compare every row with this transformer, not the recorded ones.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Tokenizer that belongs to --checkpoint.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare every output with this backend (ort-cpu), not with the reference.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a bundle against the reference again. Exit code 3 and the first scale and output that diverge, if any."""
    if against is not None and checkpoint is not None:
        raise InvalidInput("--against with --checkpoint", expected="one of them", fix="leave one out")
    if (checkpoint is None) != (vae is None):
        raise InvalidInput("one of --checkpoint and --vae", expected="both or none", fix="pass the pair")
    _require_torch()
    from flexvar_runtime import Bundle, Guidance, ScaleSchedule

    from .bundle import load_reference, torch_threads
    from .facts import model_facts
    from .parity import prove, require_parity
    from .proof import PROOF_FILE, Proof, make_proof

    opened = Bundle.open(bundle)
    defaults = opened.manifest.defaults
    if checkpoint is not None and vae is not None:
        with torch_threads(threads):
            model, tokenizer = load_reference(checkpoint, vae)
            _require_sizes(opened.manifest.model, model_facts(model, tokenizer))
            guidance = Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)
            proof = make_proof(model, tokenizer, ScaleSchedule.parse(defaults.schedule), guidance)
        del model, tokenizer
    else:
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
    data = {"bundle": opened.sha256, "parity": _summary(record)}
    if record.passed and backend in TENSORRT_BACKENDS:
        data["engines"] = _inspected(opened, backend, device, engines)
    if record.passed or not as_json:
        emit(data, as_json, lambda: _show_record(record))
    require_parity(record)


def _inspected(bundle: Bundle, backend: str, device: str | None, engines: Path | None) -> dict[str, object]:
    """Types the kernels of every engine compute in, as the engines themselves say."""
    from flexvar_runtime.files.strict_json import encode

    from .engine_inspection import inspect_engines

    reports = inspect_engines(bundle, backend, device=device, engines=engines)
    return {graph: encode(report) for graph, report in reports.items()}


def _require_sizes(bundle: ModelFacts, checkpoint: ModelFacts) -> None:
    pairs = [
        (field.name, getattr(bundle, field.name), getattr(checkpoint, field.name))
        for field in fields(bundle)
        if field.name != "class_names"
    ]
    differ = [pair for pair in pairs if pair[1] != pair[2]]
    if differ:
        raise ParityFailed(
            "a bundle with " + ", ".join(f"{name} {got}" for name, got, _ in differ),
            expected=", ".join(f"{name} {expected}" for name, _, expected in differ),
            fix="pass the checkpoint it was made from",
        )


def _read_order(path: Path, default: str) -> tuple[str, ...]:
    """Schedules of a table to the size of the default one, best first."""
    from flexvar_runtime import ScaleSchedule

    from .quality import best_first, read_quality

    return best_first(read_quality(path), ScaleSchedule.parse(default))


def _read_class_names(path: Path) -> tuple[str, ...]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} ({error})", expected="a JSON list of names", fix="one name per class, in label order"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(
            f"{path} of another form", expected="a JSON list of names", fix="one name per class, in label order"
        )
    return tuple(names)


def _summary(record: ParityRecord) -> dict[str, object]:
    from flexvar_runtime.files.strict_json import encode

    return encode(record)  # type: ignore[return-value]


def _show_record(record: ParityRecord) -> None:
    from rich import box
    from rich.table import Table

    from .parity import holds

    title = f"parity on {record.backend}{', bf16 emulated in float32' if record.emulated else ''}"
    labels = {"relative_error": "rel. error", "psnr_db": "PSNR, dB"}  # 80 columns hold a row
    columns = ("graph", "scale", "output", "metric", "value", "bound", "")
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for row in record.rows:
        mark = "ok" if holds(row) else "FAILED"
        metric = labels.get(row.metric, row.metric)
        table.add_row(row.graph, row.scale or "", row.output, metric, f"{row.value:.3g}", f"{row.bound:g}", mark)
    out.print(table)
    if record.free_running_agreement is not None:
        equal = f"free-running tokens equal to the reference's: {record.free_running_agreement:.2%}"
        out.print(f"{equal} (no gate)", highlight=False)
