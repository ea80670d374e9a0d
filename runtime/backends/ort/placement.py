"""Where ONNX Runtime runs the nodes of a graph, and whether its CUDA provider has a kernel for each of them.

A node without a CUDA kernel runs on the CPU, with a copy there and one back, and ONNX Runtime only says so in a log
that is usually off. Arithmetic on shapes belongs on the CPU: the sizes it computes are needed there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ...bundle.onnx_scan import Node, Scan
from ...errors import BackendUnavailable
from ...model.signatures import OPSET

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"  # the session option without which nothing is recorded
EXPORT_FOR_GPU = "export the bundle again with flexvar export --target gpu"
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
    "InstanceNormalization": _NONE,  # the provider has it for opsets up to 21
    "GroupNormalization": _NONE,
}
"""Floating-point types (numbers of the ONNX format) that ONNX Runtime 1.31's CUDA provider computes an operator in,
read from the provider itself; operators that no graph of ours has are left out."""

_MOVES = frozenset({"Cast", "Concat", "Gather", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"})


def without_cuda_kernel(scan: Scan) -> tuple[Node, ...]:
    """Nodes of a graph that compute something and that the CUDA provider is not known to have a kernel for.

    All of them where the graph has operators of another version than KERNELS.
    """
    shapes = scan.shape_arithmetic()
    computing = (node for node in scan.nodes if not shapes.intersection(node.outputs))
    return tuple(node for node in computing if scan.opset != OPSET or not _has_kernel(node, scan))


def _has_kernel(node: Node, scan: Scan) -> bool:
    types = _NONE if node.domain else KERNELS.get(node.operator, _NONE)
    kind = next((scan.kinds[name] for name in node.outputs if name in scan.kinds), None)
    return bool(types) and (kind not in _WIDE or kind in types)


def require_placed(session: Any, scan: Scan, graph: str, provider: str) -> None:
    """Raise BackendUnavailable where `session` runs a node that computes something on another provider.

    session: made with the option RECORD_ASSIGNMENT; scan: of the file it was made from; graph: its name, for the
    message.
    """
    recorded = getattr(session, "get_provider_graph_assignment_info", None)
    if recorded is None:
        raise BackendUnavailable(
            "an ONNX Runtime that does not say where it runs the nodes of a graph",
            expected="onnxruntime-gpu 1.31.1 or later",
            fix="pip install --upgrade 'onnxruntime-gpu>=1.31.1'",
        )
    shapes = scan.shape_arithmetic()
    by_name = {node.name: node for node in scan.nodes if node.name}

    def computes(operator: str, name: str) -> bool:
        """A node that ONNX Runtime itself made up, or that has no name, is judged by its operator."""
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
            f"graph {graph}, of which {count_operators(each for each, _ in elsewhere)} would run on the CPU; the first "
            f"is {name or 'without a name'} ({operator})",
            expected=f"a CUDA kernel for every node in {provider}",
            fix=f"{EXPORT_FOR_GPU}, or use another backend (flexvar doctor lists those that work)",
        )


def count_operators(operators: Iterable[str]) -> str:
    """Operators and how many nodes each has: "39 InstanceNormalization, 1 Pad"."""
    return ", ".join(f"{count} {operator}" for operator, count in Counter(operators).most_common())
