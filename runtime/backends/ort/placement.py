"""Checks that ONNX Runtime runs every node of a graph on the GPU.

A node without a CUDA kernel runs on the CPU, with a copy of its tensors there and back. ONNX Runtime reports this only
in a log that is usually off. Nodes that compute shapes are exempt: the CPU needs the sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...bundle.onnx_scan import Node, Scan
from ...errors import BackendUnavailable
from ...model.signatures import OPSET

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # session option; `require_placed` needs it
EXPORT_FOR_GPU = "Export the bundle again with flexvar export --target gpu, or use another backend."
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_WIDE = frozenset({_FLOAT, _FLOAT16, _BFLOAT16})
_NO_BFLOAT16 = frozenset({_FLOAT, _FLOAT16})
_NONE = frozenset[int]()
_ANY_TYPE = (
    "Add Attention Cast Concat Conv Div Expand Gather Gelu Identity LayerNormalization MatMul Max Min Mod Mul Pow "
    "ReduceMean Reshape Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where"
)
KERNELS: dict[str, frozenset[int]] = {
    **dict.fromkeys(_ANY_TYPE.split(), _WIDE),
    **dict.fromkeys(["Clip", "ConvTranspose", "Pad", "Reciprocal", "ReduceL2", "Resize"], _NO_BFLOAT16),
    **dict.fromkeys(["And", "Constant", "Equal", "GreaterOrEqual", "Not", "Range", "Shape"], _WIDE),  # other types
    "InstanceNormalization": _NONE,  # the provider has kernels up to opset 21 only
    "GroupNormalization": _NONE,
}
"""Operator to the floating-point types (ONNX element types) of its kernels in the CUDA provider of ONNX Runtime 1.31.

Read from the provider. Operators that our graphs do not use are left out."""

_MOVES = frozenset({"Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"})


def without_cuda_kernel(scan: Scan) -> tuple[Node, ...]:
    """Nodes without a known CUDA kernel, except those that compute shapes.

    If the graph's opset is not the one of KERNELS, no kernel is known.
    """
    shapes = scan.shape_arithmetic()
    computing = (node for node in scan.nodes if not shapes.intersection(node.outputs))
    return tuple(node for node in computing if scan.opset != OPSET or not _has_kernel(node, scan))


def _has_kernel(node: Node, scan: Scan) -> bool:
    types = _NONE if node.domain else KERNELS.get(node.operator, _NONE)
    kind = next((scan.kinds[name] for name in node.outputs if name in scan.kinds), None)
    return bool(types) and (kind not in _WIDE or kind in types)


def require_placed(session: Any, scan: Scan, graph: str, provider: str) -> None:
    """Raise BackendUnavailable if a node runs on another provider, except nodes that compute shapes.

    session: opened with the option RECORD_ASSIGNMENT. scan: the scan of its file. graph: the graph's name, for the
    message.
    """
    recorded = getattr(session, "get_provider_graph_assignment_info", None)
    if recorded is None:
        raise BackendUnavailable(
            "This version of ONNX Runtime does not report on which device it runs the nodes of a graph.",
            expected="onnxruntime-gpu 1.31.1 or later",
            fix="Run: pip install --upgrade 'onnxruntime-gpu>=1.31.1'",
        )
    shapes = scan.shape_arithmetic()
    by_name = {node.name: node for node in scan.nodes if node.name}

    def computes(operator: str, name: str) -> bool:
        """Whether a node does more than compute shapes. Nodes that the file does not name are judged by operator."""
        node = by_name.get(name)
        return operator not in _MOVES if node is None else not shapes.intersection(node.outputs)

    elsewhere = [
        (str(node.op_type), str(node.name))
        for part in recorded()
        for node in part.get_nodes()
        if part.ep_name != provider and computes(node.op_type, node.name)
    ]
    if elsewhere:
        operator, name = elsewhere[0]
        raise BackendUnavailable(
            f"{count_operators(each for each, _ in elsewhere)} of the graph {graph} would run on the CPU (the first is "
            f"{name or 'without a name'}, {operator}).",
            expected=f"a CUDA kernel for every node in {provider}",
            fix=EXPORT_FOR_GPU,
        )


def count_operators(operators: Iterable[str]) -> str:
    """The number of nodes of each operator, such as "39 InstanceNormalization, 1 Pad"."""
    return ", ".join(f"{count} {operator}" for operator, count in Counter(operators).most_common())
