"""In which precision a network computes: proved from the types of what the parser made, before anything is built.

TensorRT has no precision flags: what the ONNX graph's types say is what runs, and a float32 graph runs in float32
without a word. So every matrix product, convolution and attention must be in the precision that the bundle claims, but
for the islands that `flexvar_export.modules` keeps in float32 and the parts that the manifest names.
`inspect_precision` says the same of a finished engine.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flexvar_runtime.backends.tensorrt.engine_files import PrecisionReport
from flexvar_runtime.backends.tensorrt.library import TrtLibrary
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.strict_json import loads
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import ENCODE, PREFILL, STEP

MATMUL, CONVOLUTION, ATTENTION = KINDS = ("matmul", "convolution", "attention")
FLOAT32_ISLANDS = {
    STEP: {(MATMUL, "codes")},
    PREFILL: {(MATMUL, "codes")},
    ENCODE: {(CONVOLUTION, "image"), (CONVOLUTION, "latent")},
}
"""Layers that stay float32 in half precision: kind, and the graph's input they read or output they give."""
_PART_MATMULS = {"attention": 6, "mlp": 2}  # q, k, v, scores, values and projection; both products
FUSED_HEAD_SIZE = 256  # the largest for which attention in half precision has a kernel of its own
_KINDS = {
    "MATRIX_MULTIPLY": MATMUL,
    "EINSUM": MATMUL,
    "CONVOLUTION": CONVOLUTION,
    "DECONVOLUTION": CONVOLUTION,
    "ATTENTION_INPUT": ATTENTION,
}
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}


@dataclass(frozen=True)
class Layer:
    """A layer that carries the arithmetic. border: the graph's inputs it reads and outputs it gives, itself."""

    name: str
    kind: str
    dtype: str
    border: frozenset[str]
    fused: bool


def dtype_name(dtype: Any) -> str:
    """The manifest's name of a TensorRT type."""
    return _DTYPES.get(dtype.name, dtype.name.lower())


def attention_of(library: TrtLibrary, layer: Any) -> Any:
    """The attention behind a layer of type ATTENTION_INPUT, which the network gives as a plain layer."""
    layer.__class__ = library.module.IAttentionInputLayer
    return layer.attention


def decompose_attention(library: TrtLibrary, network: Any) -> int:
    """Allow attention that has no kernel (float32, or large heads) to be built from other layers; returns how many."""
    count = 0
    for layer in _layers(network):
        if layer.type.name != "ATTENTION_INPUT":
            continue
        query = layer.get_input(0)
        if dtype_name(query.dtype) == "float32" or query.shape[-1] > FUSED_HEAD_SIZE:
            attention_of(library, layer).decomposable = True
            count += 1
    return count


def arithmetic(library: TrtLibrary, network: Any) -> list[Layer]:
    """Every matrix product, convolution and attention of a parsed network, with the type it computes in."""
    found = []
    for layer in _layers(network):
        kind = _KINDS.get(layer.type.name)
        if kind is None:
            continue
        given = [layer.get_input(i) for i in range(layer.num_inputs)]
        read = {tensor.name for tensor in given if tensor is not None and tensor.is_network_input}
        made = {
            tensor.name
            for tensor in (layer.get_output(i) for i in range(layer.num_outputs))
            if tensor.is_network_output
        }
        fused = kind == ATTENTION and not attention_of(library, layer).decomposable
        found.append(Layer(layer.name, kind, dtype_name(given[0].dtype), frozenset(read | made), fused))
    return found


def prove_precision(
    graph: str, precision: str, layers: Iterable[Layer], attention_layers: int, kept: Collection[str] = ()
) -> PrecisionReport:
    """Refuse a graph that computes in another precision than it claims, islands and parts kept in float32 aside.

    attention_layers: how many the ONNX graph has. In half precision those of `step` must all be fused: decomposed, they
    would write every score to memory. kept: the manifest's `float32_parts`. Raises ArtifactRefused.
    """
    layers, claimed = list(layers), Precision(precision).dtype
    islands = FLOAT32_ISLANDS.get(graph, set()) if precision != "fp32" else set()
    declared = kept_matmuls(graph, kept)
    wrong = [layer for layer in layers if layer.dtype != (_island_dtype(layer, islands) or claimed)]
    if _as_declared(graph, wrong, declared):
        wrong = []
    right = sum(layer.dtype == claimed for layer in layers)
    if wrong or not layers:
        names = ", ".join(f"{layer.kind} {layer.name} in {layer.dtype}" for layer in wrong[:3])
        raise ArtifactRefused(
            f"{graph}: {right} of {len(layers)} matmul, convolution and attention layers in {claimed}"
            + (f" ({names}{', …' if len(wrong) > 3 else ''})" if wrong else ""),
            expected=f"all in {claimed}"
            + (f" but {_listed(islands)} in float32" if islands else "")
            + (f", and {', '.join(kept)}" if declared else ""),
            fix=f"export the bundle again with --precision {precision}",
        )
    attention = [layer for layer in layers if layer.kind == ATTENTION]
    fused = sum(layer.fused for layer in attention)
    must_fuse = graph == STEP and precision != "fp32"
    if len(attention) != attention_layers or (must_fuse and fused != len(attention)):
        raise ArtifactRefused(
            f"{graph}: {fused} fused of {len(attention)} attention layers, {attention_layers} in the graph",
            expected=f"{attention_layers}{', all fused' if must_fuse else ''}",
            fix="export the bundle again; heads are fused up to a size of 256",
        )
    return _report(claimed, Counter((layer.kind, layer.dtype) for layer in layers), fused)


def kept_matmuls(graph: str, kept: Collection[str]) -> int:
    """How many matrix products the parts that stay float32 come to: in `prefill` at most, whose last block ends with
    keys and values."""
    return sum(_PART_MATMULS[part.rpartition(".")[2]] for part in kept) if graph in (STEP, PREFILL) else 0


def _as_declared(graph: str, others: list[Layer], declared: int) -> bool:
    """Whether the layers in another type than claimed are what the parts kept in float32 come to, and nothing else."""
    kept = all(layer.kind == MATMUL and layer.dtype == "float32" and not layer.border for layer in others)
    return kept and (len(others) == declared if graph == STEP else len(others) <= declared)


def _island_dtype(layer: Layer, islands: set[tuple[str, str]]) -> str | None:
    """float32 for an island, else None: what the bundle claims."""
    return "float32" if any((layer.kind, name) in islands for name in layer.border) else None


def _listed(islands: set[tuple[str, str]]) -> str:
    return " and ".join(f"the {kind} at {name}" for kind, name in sorted(islands))


def _layers(network: Any) -> Iterable[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


# The inspector's text of a finished engine: its layers are kernels, named by what they do.
_KERNELS = (
    (ATTENTION, re.compile(r"mha|attention|flash", re.IGNORECASE)),
    (CONVOLUTION, re.compile(r"conv", re.IGNORECASE)),
    (MATMUL, re.compile(r"gemm|matmul|matrix", re.IGNORECASE)),
)
_FORMATS = (
    ("bfloat16", re.compile(r"\bb(?:f16|float16)\b", re.IGNORECASE)),
    ("float16", re.compile(r"\b(?:fp16|half|float16)\b", re.IGNORECASE)),
    ("float32", re.compile(r"\b(?:fp32|float|float32)\b", re.IGNORECASE)),
)


def inspect_precision(engine_information_json: str, claimed: str) -> PrecisionReport:
    """Kernels of a finished engine by kind and type of their first input, from the engine inspector's JSON.

    The engine was built with detailed verbosity; `claimed` is a dtype of the manifest. What the compiler generated
    (type "kgen") counts only where it is attention. Raises ArtifactRefused where the text tells of no such kernels.
    """
    document = loads(engine_information_json, where="engine information", fix="Build the engine again.")
    rows = document.get("Layers") if isinstance(document, dict) else None
    kernels = [_kernel(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    counts = Counter(kernel for kernel in kernels if kernel is not None)
    if not counts:
        raise ArtifactRefused(
            "engine information without typed layers", expected="that of detailed verbosity", fix="build it again"
        )
    return _report(claimed, counts, sum(n for (kind, _), n in counts.items() if kind == ATTENTION))


def _kernel(row: dict[str, Any]) -> tuple[str, str] | None:
    """Kind and dtype of one row."""
    layer_type, inputs = str(row.get("LayerType", "")), row.get("Inputs")
    if layer_type.lower() == "kgen":
        kind = ATTENTION if _KERNELS[0][1].search(str(row.get("TacticName", ""))) else None
    else:
        kind = next((kind for kind, pattern in _KERNELS if pattern.search(layer_type)), None)
    first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
    text = str(first.get("Format/Datatype", ""))
    dtype = next((dtype for dtype, pattern in _FORMATS if pattern.search(text)), None)
    return (kind, dtype) if kind and dtype else None


def _report(claimed: str, counts: Counter[tuple[str, str]], fused: int) -> PrecisionReport:
    kinds = [kind for kind in KINDS if any(kind == k for k, _ in counts)]
    return PrecisionReport(
        claimed=claimed,
        layers={kind: {dtype: n for (k, dtype), n in sorted(counts.items()) if k == kind} for kind in kinds},
        fused_attention=fused,
        share=round(sum(n for (_, dtype), n in counts.items() if dtype == claimed) / counts.total(), 4),
    )
