"""Checkpoint to bundle: export every graph, prove it, and only then give the directory its name."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import flexvar_ref
from flexvar_runtime import Bundle, Guidance, ScaleSchedule
from flexvar_runtime.backends import create
from flexvar_runtime.bundle_writer import seal, write_bundle
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.graphs import TABLES_FILE, WEIGHTS_OF, graph_specs
from flexvar_runtime.manifest import PRECISIONS, SCHEMA_VERSION, Manifest, ParityRecord, Provenance

from .activations import largest_activations, refuse_overflow
from .facts import PUBLISHED_DEFAULTS, model_facts, tables
from .modules import graph_module
from .onnx_graphs import export_graph
from .parity import prove, require_parity
from .proof import PROOF_FILE, make_proof

TORCH_PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")
UNPROVEN = ParityRecord(backend="none", emulated=False, passed=False, rows=(), free_running_agreement=None)

Progress = Callable[[str], None]


def export_bundle(
    transformer: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    class_names: tuple[str, ...] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Export a checkpoint to the bundle `out` and prove it on ort-cpu.

    Raises ArtifactRefused (checkpoint or fp16 range), ParityFailed, InvalidInput, BackendUnavailable. Whatever happens,
    nothing unproven is left under the name `out`.
    """
    if precision not in PRECISIONS:
        raise InvalidInput(f"precision {precision!r}", expected=" or ".join(PRECISIONS), fix="name one of them")
    create("ort-cpu", threads=threads)  # what the proof needs is refused now, not after the export
    with write_bundle(out, force=force) as directory:
        progress("loading the checkpoint")
        model, vae = load_reference(transformer, tokenizer)
        facts, defaults = model_facts(model, vae, class_names), PUBLISHED_DEFAULTS
        progress("running the reference")
        guidance = Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)
        proof = make_proof(model, vae, ScaleSchedule.parse(defaults.schedule), guidance)
        proof.thinned().save(directory / PROOF_FILE)
        progress("measuring activations")
        largest = largest_activations(model, vae, proof)
        if precision == "fp16":
            refuse_overflow(largest)
        specs = graph_specs(facts, precision)
        for name, spec in specs.items():
            progress(f"exporting {name}")
            module = graph_module(name, model, vae, TORCH_PRECISIONS[precision])
            export_graph(module, spec, directory, specs.get(WEIGHTS_OF.get(name, "")))
        tables(model, vae).save(directory / TABLES_FILE)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision=precision,
            model=facts,
            graphs=specs,
            defaults=defaults,
            provenance=Provenance(
                transformer_sha256=_sha256(Path(transformer)), tokenizer_sha256=_sha256(Path(tokenizer)), tools=_tools()
            ),
            parity=UNPROVEN,
            largest_activation=largest,
            files={},
        )
        del model, vae
        progress("proving parity")
        record = prove(seal(directory, manifest), proof, threads=threads)
        require_parity(record)
        seal(directory, replace(manifest, parity=record))
    return Bundle.open(out)


def load_reference(
    transformer: str | os.PathLike[str], tokenizer: str | os.PathLike[str]
) -> tuple[flexvar_ref.FlexVAR, flexvar_ref.Tokenizer]:
    """`flexvar_ref.load` with its refusals as the runtime's typed error."""
    try:
        return flexvar_ref.load(os.fspath(transformer), os.fspath(tokenizer))
    except flexvar_ref.CheckpointError as error:
        raise ArtifactRefused(error.got, expected=error.expected, fix=error.fix) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tools() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("flexvar-deploy", *TOOLS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
