"""Export a checkpoint to a bundle. The directory gets its name only after every graph is proved."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import flexvar_ref
from flexvar_ref.safetensors_files import list_files
from flexvar_runtime import Bundle, Guidance, ScaleSchedule
from flexvar_runtime.backends import create
from flexvar_runtime.backends.host_arrays import MAX_THREADS
from flexvar_runtime.backends.loading import load_onnxruntime
from flexvar_runtime.backends.ort.byte_products import make_exact
from flexvar_runtime.bundle.certificate import check_certificate
from flexvar_runtime.bundle.manifest import Defaults, Manifest, ParityRecord, Provenance
from flexvar_runtime.checks import check_choice, check_whole
from flexvar_runtime.errors import ArtifactRefused, InvalidInput
from flexvar_runtime.machine.processors import default_threads
from flexvar_runtime.machine.threads import require_threads
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import PREFILL, SCHEMA_VERSION, STEP, TABLES_FILE, WEIGHTS_OF, graph_specs
from flexvar_runtime.model.tensors import GraphSpec

from .activations import largest_activations, refuse_overflow
from .bundle_writer import seal, write_bundle
from .facts import PUBLISHED_DEFAULTS, model_facts, tables
from .modules import block_parts, graph_module
from .onnx_graphs import export_graph
from .parity import prove, require_parity
from .proof import PROOF_FILE, make_proof
from .sensitivity import parts_to_keep, rounding_errors, step_excess
from .targets import AUTO, GPU, choose_decoder, choose_target, require_cuda_kernels

# The dtype that `modules.graph_module` takes for a precision.
TORCH_PRECISIONS: dict[str, torch.dtype] = {
    Precision.FP32: torch.float32,
    Precision.FP16: torch.float16,
    Precision.BF16: torch.bfloat16,
    Precision.INT8: torch.int8,
}
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
    float32_parts: Sequence[str] | None = None,
    defaults: Defaults = PUBLISHED_DEFAULTS,
    quality_order: Sequence[str] = (),
    target: str = AUTO,
    decoder: str = AUTO,
    weights: str | None = None,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Export a checkpoint to the bundle `out` and prove it on ort-cpu.

    class_names: one name for each class, in label order.
    force: replace an existing bundle.
    threads: number of CPU threads.
    float32_parts: the parts of the step that stay float32 (names of `modules.block_parts`). None keeps no part, or, if
    the bundle then fails its gate, the fewest parts with which it passes. The manifest lists them.
    defaults: options of requests that leave them out. The proof uses their schedule and guidance.
    quality_order: schedules with the size of the default one, best first. Deadlines choose among them.
    target: "cpu", "gpu", or "auto" (GPU for fp16, else CPU). For a GPU every node must have a CUDA kernel.
    decoder: how the decoder upsamples: "plain" as the reference does, "phases" or "transposed" (see `upsampling`), or
    "auto", the fastest form on the target.
    weights: "ema" or "model", for a checkpoint that holds both averaged weights (EMA) and others.
    progress: called with the name of each step as it starts.

    Raises ArtifactRefused (checkpoint, fp16 range or a missing CUDA kernel), ParityFailed, InvalidInput,
    BackendUnavailable. After any error, no unproved bundle is left under the name `out`.
    """
    precision = Precision(check_choice("precision", precision, tuple(Precision)))
    if float32_parts and precision is Precision.FP32:
        raise InvalidInput(
            f"--float32 {float32_parts[0]:.100} has no effect with --precision fp32, which keeps all parts in float32.",
            expected="another precision",
            fix="Leave --float32 out, or use another --precision.",
        )
    target = choose_target(target, precision)
    decoder = choose_decoder(decoder, precision, target)
    create("ort-cpu", threads=threads)  # without the backend of the proof, fail before the export and not after it
    if precision.of(STEP) is Precision.INT8:
        library = load_onnxruntime()
        make_exact(library, library.SessionOptions())
    with torch_threads(threads), write_bundle(out, force=force) as directory:
        progress("loading the checkpoint")
        model, vae = load_reference(transformer, tokenizer, weights)
        facts, defaults = model_facts(model, vae, class_names), replace(defaults, quality_order=tuple(quality_order))
        progress("running the reference")
        guidance = Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)
        proof = make_proof(model, vae, ScaleSchedule.parse(defaults.schedule), guidance)
        proof.thinned().save(directory / PROOF_FILE)
        progress("measuring activations")
        largest = largest_activations(model, vae, proof)
        if precision is Precision.FP16:
            refuse_overflow(largest)
        specs, kept = graph_specs(facts, precision), _known_parts(float32_parts or (), facts)
        for name in specs:
            progress(f"exporting {name}")
            module = graph_module(name, model, vae, _dtype(precision, name), kept, decoder)
            _export(name, specs, module, directory)
        if target == GPU:
            require_cuda_kernels(directory, specs)
        tables(model, vae).save(directory / TABLES_FILE)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision=precision,
            float32_parts=kept,
            decoder=decoder,
            model=facts,
            graphs=specs,
            defaults=defaults,
            provenance=Provenance(
                transformer_sha256=_sha256(transformer), tokenizer_sha256=_sha256(tokenizer), tools=_tools()
            ),
            parity=UNPROVEN,
            largest_activation=largest,
            files={},
        )
        del model, vae
        progress("proving parity")
        record = prove(seal(directory, manifest), proof, threads=threads)
        if precision is not Precision.FP32 and float32_parts is None and (excess := step_excess(record)):
            progress("finding the parts that must stay float32")
            model, vae = load_reference(transformer, tokenizer, weights)
            rounded = torch.int8 if _dtype(precision, STEP) == torch.int8 else torch.bfloat16
            for kept in parts_to_keep(rounding_errors(model, proof, rounded), excess):
                progress(f"keeping {', '.join(kept)} in float32")
                for name in (STEP, PREFILL):
                    _export(name, specs, graph_module(name, model, vae, _dtype(precision, name), kept), directory)
                manifest = replace(manifest, float32_parts=kept)
                record = prove(seal(directory, manifest), proof, threads=threads)
                if record.passed:
                    break
        require_parity(record)
        sealed = seal(directory, replace(manifest, parity=record)).manifest
        check_certificate(sealed, allow_unproved=False)
    return Bundle.open(out)


def _dtype(precision: Precision, graph: str) -> torch.dtype:
    return TORCH_PRECISIONS[precision.of(graph)]


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run the body with this number of torch threads. Raises InvalidInput, EnvironmentFailed.

    None means torch's own number, but no more than this process may use: torch knows no quota of a control group.
    """
    before = torch.get_num_threads()
    chosen = min(before, default_threads()) if threads is None else check_whole("threads", threads, 1, MAX_THREADS)
    require_threads(chosen - 1)
    torch.set_num_threads(chosen)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _export(name: str, specs: Mapping[str, GraphSpec], module: nn.Module, directory: Path) -> None:
    export_graph(module, specs[name], directory, specs.get(WEIGHTS_OF.get(name, "")))


def _known_parts(names: Sequence[str], model: ModelFacts) -> tuple[str, ...]:
    """The names of parts, sorted and each once. Raises InvalidInput for a name that the model does not have."""
    known = block_parts(model.depth)
    for name in names:
        if name not in known:
            raise InvalidInput(
                f"--float32 names {name!r:.100}, but the parts of this model are {known[0]} to {known[-1]}.",
                expected=f"{known[0]} to {known[-1]}",
                fix="Name parts of this model, separated by commas.",
            )
    return tuple(sorted(set(names)))


def load_reference(
    transformer: str | os.PathLike[str], tokenizer: str | os.PathLike[str], weights: str | None = None
) -> tuple[flexvar_ref.FlexVAR, flexvar_ref.Tokenizer]:
    """`flexvar_ref.load`, with its errors raised as ArtifactRefused and InvalidInput."""
    try:
        return flexvar_ref.load(os.fspath(transformer), os.fspath(tokenizer), weights=weights)
    except flexvar_ref.CheckpointError as error:
        raise ArtifactRefused(error.got, expected=error.expected, fix=error.fix) from error
    except flexvar_ref.FlexVARRefError as error:
        raise InvalidInput(error.got, expected=error.expected, fix=error.fix) from error


def _sha256(checkpoint: str | os.PathLike[str]) -> str:
    """sha256 of a checkpoint. Of a sharded one it is that of its index and its shards, one after the other."""
    digest = hashlib.sha256()
    for path in list_files(Path(checkpoint)):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _tools() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("flexvar-deploy", *TOOLS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
