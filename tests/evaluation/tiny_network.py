"""A small feature network with random weights, for tests that need one but do not test it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flexvar_evaluation.network.contract import Head, NetworkFacts, complete_model

WIDTH = 12


def write_tiny_network(
    path: Path, *, classes: int = 4, seed: int = 0, bias: bool = False, spatial: bool = True
) -> Path:
    """Write a network with WIDTH pool features, as many spatial ones, and a head of `classes` classes."""
    rng = np.random.default_rng(seed)
    kernel = (rng.standard_normal((WIDTH, 3, 4, 4)) / 7 / 64).astype(np.float32)
    shift = rng.standard_normal(WIDTH).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernel", "shift"], ["maps"], strides=[2, 2]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["means"]),
        helper.make_node("Flatten", ["means"], ["pool"]),
    ]
    outputs = [helper.make_tensor_value_info("pool", TensorProto.FLOAT, ["N", WIDTH])]
    if spatial:
        nodes += [
            helper.make_node("GlobalMaxPool", ["active"], ["largest"]),
            helper.make_node("Flatten", ["largest"], ["spatial"]),
        ]
        outputs.append(helper.make_tensor_value_info("spatial", TensorProto.FLOAT, ["N", WIDTH]))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(shift, "shift")]
    graph = helper.make_graph(nodes, "tiny", [images], outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    head = Head(
        rng.standard_normal((WIDTH, classes)).astype(np.float32),
        rng.standard_normal(classes).astype(np.float32) if bias else None,
    )
    facts = NetworkFacts(name="tiny", source_sha256=f"{seed:064x}", conversion="test-1")
    complete_model(model, facts, head)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
