"""Rewrite the group normalisations of an OpenVINO model, so that maps keep the blocked layout of the convolutions.

In bundles of schema version 1 a group normalisation is a reshape that joins the channels of a group, and an instance
normalisation. For the reshape OpenVINO converts every map from the blocked layout and back. Sums over whole channels
need no conversion: the mean square of a channel with p pixels and norm n is n²/p, and the mean of a group is the mean
over its channels. Newer bundles contain such sums already, and nothing in them is rewritten.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..loading import load_openvino


def keep_layout(model: Any) -> int:
    """Rewrite every such normalisation of `model` in place. Returns how many it rewrote.

    The variance is the mean square minus the squared mean, in float32. Its error is far below the rounding of maps in
    half precision, for which this is used.
    """
    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "MVN"]
    rewritten = sum(map(_rewrite, found))
    model.validate_nodes_and_infer_types()
    return rewritten


def _rewrite(norm: Any) -> bool:
    grouped = norm.input_value(0).get_node()
    end = _reshaped_back(norm)
    if end is None or grouped.get_type_name() != "Reshape":
        return False
    x, options = grouped.input_value(0), norm.get_attributes()
    shape, split = x.get_partial_shape(), grouped.get_output_partial_shape(0)
    if (shape.rank.get_length(), split.rank.get_length()) != (4, 3) or shape[1].is_dynamic or split[1].is_dynamic:
        return False
    groups, channels = split[1].get_length(), shape[1].get_length()
    back = end.get_output_partial_shape(0)
    grouping = channels % groups == 0 and split[0] == shape[0] and back[1] == shape[1] and back.compatible(shape)
    grouping = grouping and _holds(norm.input_value(1).get_node(), 2)
    usual = options["normalize_variance"] and options["eps_mode"] == "INSIDE_SQRT"
    if not (grouping and usual and x.get_element_type().get_type_name() == "f32"):
        return False
    normed = _normed(x, groups, channels, float(options["eps"]))
    for reader in end.output(0).get_target_inputs():
        reader.replace_source_output(normed.output(0))
    return True


def _reshaped_back(norm: Any) -> Any:
    """The reshape to four axes that follows `norm` and ONNX's gain of one and bias of zero; None if there is none."""
    node = norm
    for neutral in (1.0, 0.0, None):
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        readers = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]
        if len(readers) != 1:
            return None
        (node,) = readers
        if node.get_type_name() == "Reshape":
            return node if node.get_output_partial_shape(0).rank.get_length() == 4 else None
        if neutral is None or not _is_constant(node, "Multiply" if neutral else "Add", neutral):
            return None
    return None


def _is_constant(node: Any, kind: str, value: float) -> bool:
    """Whether `node` is a Multiply or Add (`kind`) whose other operand is `value` everywhere."""
    return node.get_type_name() == kind and any(_holds(source.get_node(), value) for source in node.input_values())


def _holds(node: Any, value: float) -> bool:
    """Whether `node` is a constant, perhaps reshaped, that equals `value` everywhere."""
    while node.get_type_name() == "Reshape":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and bool(np.all(node.get_data() == value))


def _normed(x: Any, groups: int, channels: int, eps: float) -> Any:
    """(x − μ) / √(σ² + eps) for x (N, C, H, W), with μ and σ² per group. It is x·a − b, with a and b per channel."""
    op = load_openvino().opset13

    def whole(*numbers: int) -> Any:
        return op.constant(np.array(numbers, np.int64))

    def of_group(per_channel: Any) -> Any:  # (N, C, 1, 1) -> (N, G, 1)
        split = op.reshape(per_channel, whole(0, groups, channels // groups), special_zero=True)
        return op.reduce_mean(split, whole(2), keep_dims=True)

    def of_channel(per_group: Any) -> Any:  # (N, G, 1) -> (N, C, 1, 1)
        repeated = op.tile(per_group, whole(1, 1, channels // groups))
        return op.reshape(repeated, whole(0, channels, 1, 1), special_zero=True)

    pixels = op.reduce_prod(op.gather(op.shape_of(x), whole(2, 3), whole(0)), whole(0), keep_dims=True)
    norm = op.reduce_l2(x, whole(2, 3), keep_dims=True)
    mean = of_group(op.reduce_mean(x, whole(2, 3), keep_dims=True))
    square = of_group(op.divide(op.multiply(norm, norm), op.convert(pixels, "f32")))
    variance = op.maximum(op.subtract(square, op.multiply(mean, mean)), op.constant(np.float32(0)))
    factor = op.divide(op.constant(np.float32(1)), op.sqrt(op.add(variance, op.constant(np.float32(eps)))))
    return op.subtract(op.multiply(x, of_channel(factor)), of_channel(op.multiply(mean, factor)))
