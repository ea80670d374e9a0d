"""Conversion of the network of OpenAI's evaluator from a frozen TensorFlow graph to the ONNX file of a feature network.

Only the nodes between the input and the outputs are converted, each by one rule of `operations.py`. Others, such as the
JPEG decoder, are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper  # noqa: TID251 - loaded by the importer alone

from flexvar_runtime.checks import short
from flexvar_runtime.errors import ArtifactRefused

from .contract import IMAGES, POOL, SPATIAL, Head, NetworkFacts, complete_model
from .graphdef import EXPECTED, FIX, Graph, GraphNode
from .onnx_writer import OnnxWriter
from .operations import RULES, Value, as_array, as_image

NAME = "inception-2015"
CONVERSION = "openai-1"
"""The number changes whenever the features of a converted network change."""
SPATIAL_CHANNELS = 7  # OpenAI's evaluator keeps the first ones
_OPSET = 18  # the first whose Resize has axes
_IR_VERSION = 8


@dataclass(frozen=True)
class Layers:
    """The nodes that OpenAI's evaluator feeds and reads.

    head: a matrix product. Its second input holds the weights of the classes.
    """

    images: str = "ExpandDims"
    pool: str = "pool_3"
    spatial: str = "mixed_6/conv"
    head: str = "softmax/logits/MatMul"


def convert(graph: Graph, layers: Layers | None = None) -> bytes:
    """The ONNX file of a feature network, see `contract.py`. Equal graphs give equal bytes.

    The outputs are `pool`, the average over the image, and `spatial`, the first channels of an inner layer in the order
    height, width, channel. The head has no bias, because OpenAI's evaluator leaves it out. Raises ArtifactRefused.
    """
    layers = layers or Layers()
    writer = OnnxWriter()
    values: dict[str, Value] = {_node(graph, layers.images).name: writer.images()}
    for node in _order(graph, (layers.pool, layers.spatial), layers.images):
        rule = RULES.get(node.operation)
        if rule is None:
            node.refuse("has no rule to convert it", f"an operation out of {', '.join(RULES)}")
        values[node.name] = rule(writer, node, [values[source] for source in _sources(node)])
    features = _write_pool(writer, graph.nodes[layers.pool], values[layers.pool])
    places = _write_spatial(writer, graph.nodes[layers.spatial], values[layers.spatial])
    inputs = [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["N", "H", "W", 3])]
    outputs = [
        helper.make_tensor_value_info(POOL, TensorProto.FLOAT, ["N", features]),
        helper.make_tensor_value_info(SPATIAL, TensorProto.FLOAT, ["N", places]),
    ]
    model = helper.make_model(
        helper.make_graph(writer.nodes, NAME, inputs, outputs, writer.tensors),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="flexvar-deploy",
    )
    facts = NetworkFacts(
        name=NAME,
        source_sha256=graph.sha256,
        conversion=CONVERSION,
        operations_per_image=writer.operations or None,
    )
    complete_model(model, facts, _head(graph, layers.head, features))
    return bytes(model.SerializeToString(deterministic=True))


def _node(graph: Graph, name: str) -> GraphNode:
    if name not in graph.nodes:
        got = f"The graph has no node {short(name)}."
        raise ArtifactRefused(got, expected=EXPECTED, fix=FIX)
    return graph.nodes[name]


def _sources(node: GraphNode) -> list[str]:
    """The nodes that give the inputs of a node. Each has one output, which may be written as "name:0"."""
    names = [source.removesuffix(":0") for source in node.sources]
    for name in names:
        if ":" in name:
            node.refuse(f"has the input {short(name)}", "inputs that are the first output of a node")
    return names


def _order(graph: Graph, outputs: tuple[str, ...], images: str) -> list[GraphNode]:
    """The nodes that the outputs need, each after its inputs, up to the node `images`. Raises ArtifactRefused."""
    order: dict[str, GraphNode] = {}
    begun = set[str]()
    todo = [(name, False) for name in reversed(outputs)]
    while todo:
        name, complete = todo.pop()
        node = _node(graph, name)
        if complete:
            order[name] = node
        elif name != images and name not in order:
            if name in begun:
                node.refuse("depends on itself", "inputs that come before it")
            begun.add(name)
            todo.append((name, True))
            todo += [(source, False) for source in reversed(_sources(node))]
    return list(order.values())


def _write_pool(writer: OnnxWriter, node: GraphNode, value: Value) -> int:
    """Write the output `pool` and return its size."""
    image = as_image(writer, node, value)
    if (image.height, image.width) != (1, 1):
        node.refuse(f"gives {image.height} x {image.width} values a channel", "one")
    writer.node("Flatten", [image.name], POOL, axis=1)
    return image.channels


def _write_spatial(writer: OnnxWriter, node: GraphNode, value: Value) -> int:
    """Write the output `spatial` and return its size."""
    image = as_image(writer, node, value)
    if image.channels < SPATIAL_CHANNELS or not image.height:
        node.refuse(f"gives {image.channels} channels", f"{SPATIAL_CHANNELS} or more")
    bounds = [
        writer.tensor(f"{SPATIAL}/{key}", np.array([number], np.int64))
        for key, number in (("begin", 0), ("end", SPATIAL_CHANNELS), ("axis", 1))
    ]
    writer.node("Slice", [image.name, *bounds], "sliced")
    writer.node("Transpose", ["sliced"], "channels_last", perm=[0, 2, 3, 1])
    writer.node("Flatten", ["channels_last"], SPATIAL, axis=1)
    return SPATIAL_CHANNELS * image.height * image.width


def _head(graph: Graph, name: str, features: int) -> Head:
    """The weights of the classes. The bias that the graph adds to the product is left out."""
    node = _node(graph, name)
    sources = _sources(node)
    if node.operation != "MatMul" or len(sources) != 2 or node.flag("transpose_b", False):
        node.refuse("is not a plain matrix product", "two inputs that are not transposed")
    weights = _node(graph, sources[1])
    if weights.operation == "Identity" and len(weights.sources) == 1:
        weights = _node(graph, _sources(weights)[0])
    return Head(as_array(weights, weights.tensor("value"), (features, None)))
