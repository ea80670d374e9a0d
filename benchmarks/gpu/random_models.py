"""Makes the models to measure: random weights of the published sizes, with their bundles and proofs.

Times depend on sizes only, but parity depends on values. The recipe of `flexvar_ref.synthetic` therefore gives
activations and logits as large as those of a trained model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexvar_export.bundle import TORCH_PRECISIONS, UNPROVEN
from flexvar_export.bundle_writer import seal, write_bundle
from flexvar_export.facts import PUBLISHED_DEFAULTS, model_facts, tables
from flexvar_export.modules import graph_module
from flexvar_export.onnx_graphs import export_graph
from flexvar_export.proof import Proof, make_proof
from flexvar_ref import FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig
from flexvar_ref.parameters import published_name
from flexvar_ref.synthetic import TINY_TOKENIZER, synthetic_state, tiny_transformer
from flexvar_runtime import Bundle, Guidance, ScaleSchedule
from flexvar_runtime.bundle.manifest import ENGINES, MANIFEST, PHASES, PLAIN, Manifest, Provenance
from flexvar_runtime.bundle.onnx_scan import scan
from flexvar_runtime.files.atomic import atomic_write
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import DECODE, SCHEMA_VERSION, TABLES_FILE, WEIGHTS_OF, graph_specs

from .files import ModelFiles, Save
from .plan import REUSED, TINY
from .sources import source_hash

SEED = 0


def schedule_of(model: str) -> ScaleSchedule:
    """The published schedule of ten scales. For the tiny model five scales, the last as large as in its proof."""
    return ScaleSchedule.parse("1_2_3_4_10" if model == TINY else PUBLISHED_DEFAULTS.schedule)


def load_proof(work: Path, model: str) -> Proof:
    return Proof.load(ModelFiles.of(work, model).proof)


def default_guidance() -> Guidance:
    """The guidance of the published evaluation."""
    return Guidance(PUBLISHED_DEFAULTS.guidance_scale, PUBLISHED_DEFAULTS.guidance_rule, PUBLISHED_DEFAULTS.max_side)


def random_model(name: str) -> tuple[FlexVAR, Tokenizer]:
    """The model "tiny", "d16" or the like: float32, on the CPU, frozen for evaluation, equal in every process."""
    tiny = name == TINY
    transformer = tiny_transformer() if tiny else TransformerConfig.published(int(name.removeprefix("d")))
    with torch.device("meta"):
        tokenizer = Tokenizer(TINY_TOKENIZER if tiny else TokenizerConfig())
    _fill(tokenizer)
    with torch.device("meta"):
        model = FlexVAR(transformer, tokenizer.codebook_VD.detach())
    _fill(model)
    return model.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False)


def _fill(module: FlexVAR | Tokenizer) -> None:
    """Fill every parameter from its own random stream, in threads, because NumPy releases the interpreter lock."""

    def one(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
        published = published_name(item[0])
        return item[0], synthetic_state({published: tuple(item[1].shape)}, SEED)[published]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        module.load_state_dict(dict(pool.map(one, module.state_dict().items())), assign=True)


def export_model(name: str, work: Path, precision: str, save: Save) -> None:
    """Write the unproven bundle of a random model, and its proof: what the reference computes in float32 on the CPU.

    Files that the same sources have made in `work` before are kept. `work` holds one precision.
    """
    files, seconds, start = ModelFiles.of(work, name), dict[str, float](), time.perf_counter()
    attention: dict[str, int] = {}
    common = {"model": name, "precision": precision, "weights": "random"}
    files.keep_only(source_hash())
    if files.exist:
        save(common | {"reason": REUSED})
        return

    def done(step: str) -> None:
        nonlocal start
        seconds[step], start = time.perf_counter() - start, time.perf_counter()
        save(common | {"decoder": PLAIN, "attention_nodes": attention, "seconds": seconds})

    model, tokenizer = random_model(name)
    done("weights")
    if not files.bundle.exists():
        _write_bundle(model, tokenizer, files.bundle, precision, attention, done)
    if not files.proof.exists():
        write_proof(name, work, model, tokenizer)
        done("proof")


def write_proof(name: str, work: Path, model: FlexVAR, tokenizer: Tokenizer) -> None:
    """Write what the reference computes in float32 on the CPU."""
    proof = make_proof(model, tokenizer, schedule_of(name), default_guidance())
    with atomic_write(ModelFiles.of(work, name).proof) as temporary:
        proof.save(temporary)


def write_only_bundle(name: str, work: Path, precision: str) -> tuple[FlexVAR, Tokenizer]:
    """Write the bundle of a random model without a proof, unless the same sources have made it. Returns the model."""
    files, (model, tokenizer) = ModelFiles.of(work, name), random_model(name)
    files.keep_only(source_hash())
    if not files.bundle.exists():
        _write_bundle(model, tokenizer, files.bundle, precision, {}, lambda _: None)
    return model, tokenizer


def regenerate_model(name: str, work: Path, skeleton: Path, save: Save) -> None:
    """Write the bundle from its skeleton, and the proof. Files that the same sources have made already are kept."""
    from .skeleton import regenerate

    files, (model, tokenizer), start = ModelFiles.of(work, name), random_model(name), time.perf_counter()
    result: dict[str, Any] = {"model": name}
    files.keep_only(source_hash())
    if not files.bundle.exists():
        result |= regenerate(skeleton, (model, tokenizer), files.bundle)
        save(result | {"bundle_s": time.perf_counter() - start})
    if not files.proof.exists():
        write_proof(name, work, model, tokenizer)
    save(result | {"seconds": time.perf_counter() - start})


def _write_bundle(
    model: FlexVAR,
    tokenizer: Tokenizer,
    bundle: Path,
    precision: str,
    attention: dict[str, int],
    done: Callable[[str], None],
) -> None:
    """Write a bundle as `flexvar export` does. attention: receives the number of Attention nodes of each graph."""
    facts = model_facts(model, tokenizer)
    specs = graph_specs(facts, precision)
    with write_bundle(bundle) as directory:
        for graph, spec in specs.items():
            module = graph_module(graph, model, tokenizer, TORCH_PRECISIONS[precision], decoder=PLAIN)
            export_graph(module, spec, directory, specs.get(WEIGHTS_OF.get(graph, "")))
            attention[graph] = sum(node.operator == "Attention" for node in scan(directory / spec.file).nodes)
            done(graph)
        tables(model, tokenizer).save(directory / TABLES_FILE)
        recipe = hashlib.sha256(f"flexvar_ref.synthetic, seed {SEED}".encode()).hexdigest()
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            precision=Precision(precision),
            model=facts,
            graphs=specs,
            defaults=PUBLISHED_DEFAULTS,
            provenance=Provenance(transformer_sha256=recipe, tokenizer_sha256=recipe, tools={}),
            parity=UNPROVEN,
            largest_activation={},
            files={},
            decoder=PLAIN,
        )
        seal(directory, manifest)
    done("files")


def phases_model(name: str, work: Path, save: Save) -> None:
    """Write the bundle of an exported model again, with a decoder that upsamples in phases. The rest is hard links."""
    files = ModelFiles.of(work, name)
    manifest = replace(Bundle.open(files.bundle, allow_unproved=True).manifest, decoder=PHASES)
    with write_bundle(files.in_phases, force=True) as directory:
        spec = manifest.graphs[DECODE]
        others = shutil.ignore_patterns(ENGINES, MANIFEST, f"{spec.file}*")
        shutil.copytree(files.bundle, directory, ignore=others, copy_function=os.link, dirs_exist_ok=True)
        module = graph_module(DECODE, *random_model(name), TORCH_PRECISIONS[manifest.precision], decoder=PHASES)
        export_graph(module, spec, directory)
        seal(directory, manifest)
    save({"model": name, "precision": manifest.precision, "decoder": PHASES})
