"""Check the precision of a parsed network before it is built.

TensorRT has no precision flags. It computes in the types of the ONNX graph, and runs a float32 graph in float32 without
a warning. So every matrix product, convolution and attention must have the precision that the bundle claims. Exceptions
are the islands that `flexvar_export.modules` keeps in float32, and the parts that the manifest lists.
`inspect_precision` reports the types of a finished engine.
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
"""Layers that stay float32 in half precision: their kind, and the input or output of the graph they are attached to."""
_PART_MATMULS = {"attention": 6, "mlp": 2}  # q, k, v, scores, values, projection; fc1, fc2
FUSED_HEAD_SIZE = 256  # the largest head for which half-precision attention has a fused kernel
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
    """A matrix product, convolution or attention. border: inputs and outputs of the graph that it reads or writes."""

    name: str
    kind: str
    dtype: str
    border: frozenset[str]
    fused: bool


def dtype_name(dtype: Any) -> str:
    """The name of a TensorRT type as in the manifest, such as "float16"."""
    return _DTYPES.get(dtype.name, dtype.name.lower())


def attention_of(library: TrtLibrary, layer: Any) -> Any:
    """The attention that a layer of type ATTENTION_INPUT belongs to. The network returns it as a plain layer."""
    layer.__class__ = library.module.IAttentionInputLayer
    return layer.attention


def decompose_attention(library: TrtLibrary, network: Any) -> None:
    """Let attention without a fused kernel (float32, or large heads) be built from other layers."""
    for layer in _layers(network):
        if layer.type.name != "ATTENTION_INPUT":
            continue
        query = layer.get_input(0)
        if dtype_name(query.dtype) == "float32" or query.shape[-1] > FUSED_HEAD_SIZE:
            attention_of(library, layer).decomposable = True


def arithmetic(library: TrtLibrary, network: Any) -> list[Layer]:
    """The matrix products, convolutions and attentions of a parsed network, with the types they compute in."""
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
    """Raise ArtifactRefused unless the layers compute in the claimed precision, except islands and kept parts.

    attention_layers: number of attentions in the ONNX graph. In half precision those of `step` must all be fused,
    because decomposed attention writes every score to memory. kept: `float32_parts` of the manifest.
    """
    layers, precision = list(layers), Precision(precision)
    claimed = precision.dtype
    islands = FLOAT32_ISLANDS.get(graph, set()) if precision is not Precision.FP32 else set()
    declared = kept_matmuls(graph, kept)
    wrong = [layer for layer in layers if layer.dtype != (_island_dtype(layer, islands) or claimed)]
    if _as_declared(graph, wrong, declared):
        wrong = []
    right = sum(layer.dtype == claimed for layer in layers)
    if wrong or not layers:
        names = ", ".join(f"{layer.kind} {layer.name} in {layer.dtype}" for layer in wrong[:3])
        exceptions = [f"the {kind} at {name}" for kind, name in sorted(islands)] + (list(kept) if declared else [])
        expected = f"all in {claimed}" + (f" except {', '.join(exceptions)}" if exceptions else "")
        raise ArtifactRefused(
            f"{graph} computes {right} of {len(layers)} matmul, convolution and attention layers in {claimed}"
            + (f" ({names}{', …' if len(wrong) > 3 else ''})" if wrong else "")
            + f", but it must compute {expected}.",
            expected=expected,
            fix=f"Export the bundle again with --precision {precision}.",
        )
    attention = [layer for layer in layers if layer.kind == ATTENTION]
    fused = sum(layer.fused for layer in attention)
    must_fuse = graph == STEP and precision is not Precision.FP32
    if len(attention) != attention_layers or (must_fuse and fused != len(attention)):
        expected = f"{attention_layers}{', all fused' if must_fuse else ''}"
        raise ArtifactRefused(
            f"{graph} has {len(attention)} attention layers in TensorRT, {fused} of them fused, but needs {expected}.",
            expected=expected,
            fix=f"Export the bundle again from a model with heads of at most {FUSED_HEAD_SIZE}.",
        )
    return _report(claimed, Counter((layer.kind, layer.dtype) for layer in layers), fused)


def kept_matmuls(graph: str, kept: Collection[str]) -> int:
    """The number of matrix products in the parts kept in float32. `prefill` may have fewer: its last block stops after
    keys and values."""
    return sum(_PART_MATMULS[part.rpartition(".")[2]] for part in kept) if graph in (STEP, PREFILL) else 0


def _as_declared(graph: str, others: list[Layer], declared: int) -> bool:
    """Whether the layers of other types are exactly the `declared` products that are kept in float32."""
    kept = all(layer.kind == MATMUL and layer.dtype == "float32" and not layer.border for layer in others)
    return kept and (len(others) == declared if graph == STEP else len(others) <= declared)


def _island_dtype(layer: Layer, islands: set[tuple[str, str]]) -> str | None:
    """float32 for an island, None for other layers, which have the claimed type."""
    return "float32" if any((layer.kind, name) in islands for name in layer.border) else None


def _layers(network: Any) -> Iterable[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


# In the report of the engine inspector, layers are kernels whose names tell their kind.
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
    """The kernels of a finished engine by kind and type of their first input, from the JSON of the engine inspector.

    claimed: a dtype as in the manifest. Kernels that the compiler generated (type "kgen") count only where they are
    attention. Raises ArtifactRefused where the text lists no typed kernels, as without detailed verbosity.
    """
    document = loads(engine_information_json, where="engine information", fix="Build the engine again.")
    rows = document.get("Layers") if isinstance(document, dict) else None
    kernels = [_kernel(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    counts = Counter(kernel for kernel in kernels if kernel is not None)
    if not counts:
        raise ArtifactRefused(
            "The engine information lists no typed layers.",
            expected="the information of an engine built with detailed verbosity",
            fix="Build the engine again with flexvar build --force.",
        )
    return _report(claimed, counts, sum(n for (kind, _), n in counts.items() if kind == ATTENTION))


def _kernel(row: dict[str, Any]) -> tuple[str, str] | None:
    """The kind and dtype of one row, or None for other kernels."""
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
