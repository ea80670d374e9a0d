"""The conversion computes what TensorFlow's operations are defined to compute, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphdef_file import FLOAT, GraphFile, Type, constant_of, floats, tensor_of, tiny
from numpy.typing import NDArray

from flexvar_evaluation.network.contract import NetworkFacts
from flexvar_evaluation.network.conversion import SPATIAL_CHANNELS, convert
from flexvar_evaluation.network.features import FeatureNetwork
from flexvar_evaluation.network.graphdef import read_graph
from flexvar_runtime import ArtifactRefused

Opener = Callable[..., FeatureNetwork]
Array = NDArray[np.float64]
IMAGES = np.random.default_rng(5).integers(0, 256, (2, 20, 31, 3), np.uint8)


@pytest.fixture
def converted_file(tmp_path: Path) -> Callable[[GraphFile], bytes]:
    """GraphDef -> the ONNX file."""
    return lambda graph: convert(read_graph(graph.write(tmp_path / "graph.pb")))


def windows(image: Array, size: tuple[int, int], stride: int, padding: bytes, fill: float) -> Array:
    """The windows of an image (height, width, channels), as (rows, columns, height, width, channels).

    With SAME the output has ceil(size / stride) pixels, and an odd pixel of padding is at the end.
    """
    if padding == b"SAME":
        pads = []
        for length, side in zip(image.shape[:2], size, strict=True):
            total = max((-(-length // stride) - 1) * stride + side - length, 0)
            pads.append((total // 2, total - total // 2))
        image = np.pad(image, [*pads, (0, 0)], constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(image, size, (0, 1))[::stride, ::stride]
    return np.asarray(np.moveaxis(found, 2, -1))


def resized(image: Array, side: int) -> Array:
    """TensorFlow's ResizeBilinear: pixel i is read from i * size_in / side, between two neighbours."""
    for axis in (0, 1):
        size = image.shape[axis]
        place = np.arange(side) * (size / side)
        low = place.astype(int)
        part = (place - low).reshape([-1 if each == axis else 1 for each in range(3)])
        upper = image.take(np.minimum(low + 1, size - 1), axis)
        image = image.take(low, axis) * (1 - part) + upper * part
    return image


class Computed:
    """Computes a network like `tiny` in float64, from the tensors in its file."""

    def __init__(self, path: Path) -> None:
        self.nodes = read_graph(path).nodes

    def value(self, name: str, image: Array) -> Array:
        node = self.nodes[name]
        if name == "ExpandDims":
            return image
        if node.operation == "Const":
            return node.tensor("value").astype(np.float64)
        got = [self.value(source.removesuffix(":0"), image) for source in node.sources]
        match node.operation:
            case "ResizeBilinear":
                return resized(got[0], int(got[1][0]))
            case "Sub":
                return got[0] - got[1]
            case "Mul":
                return got[0] * got[1]
            case "Relu":
                return np.maximum(got[0], 0)
            case "Concat":
                return np.concatenate(got[1:], -1)
            case "ConcatV2":
                return np.concatenate(got[:-1], -1)
            case "Conv2D":
                weights = got[1]
                parts = windows(got[0], weights.shape[:2], node.integers("strides")[1], self._padding(name), 0)
                return np.einsum("rchwi,hwio->rco", parts, weights)
            case "BatchNormWithGlobalNormalization":
                mean, variance, beta, gamma = got[1:]
                scaled = (got[0] - mean) / np.sqrt(variance + node.number("variance_epsilon"))
                return scaled * (gamma if node.flag("scale_after_normalization", False) else 1) + beta
            case "MaxPool" | "AvgPool":
                size = node.integers("ksize")[1:3]
                parts = windows(got[0], size, node.integers("strides")[1], self._padding(name), np.nan)
                return (np.nanmax if node.operation == "MaxPool" else np.nanmean)(parts, (2, 3))
        return got[0]

    def _padding(self, name: str) -> bytes:
        return self.nodes[name].text("padding").encode()


def varied() -> GraphFile:
    """A network with what the recorded one lacks: strides with SAME padding, gammas, ConcatV2, a pass of constants."""
    graph = tiny()
    graph.set_attribute("conv/Conv2D", "padding", b"SAME")
    graph.set_attribute("pool", "padding", b"SAME")
    graph.set_attribute("pool_3", "ksize", [1, 6, 6, 1])
    graph.set_attribute("conv/batchnorm", "scale_after_normalization", True)
    gamma = np.random.default_rng(3).uniform(0.5, 2, 8).astype(np.float32)
    graph.replace(constant_of("conv/batchnorm/gamma", FLOAT, tensor_of(FLOAT, (8,), floats(gamma))))
    [joined] = [node for node in graph.nodes if node.name == "mixed_6/join"]
    axis, *sources = joined.inputs
    graph.change("mixed_6/join", operation="ConcatV2", inputs=(*sources, axis))
    graph.change("mixed_6/conv/Conv2D", inputs=("pool:0", "passed"))
    graph.node("Identity", "passed", "mixed_6/conv/conv2d_params", T=Type(FLOAT))
    return graph


@pytest.mark.parametrize("network", [tiny, varied])
def test_the_operations(network: Callable[[], GraphFile], tmp_path: Path, opened: Opener) -> None:
    """The features reach 3. float32 rounds the places of pixels, which makes differences of 3e-6."""
    path = network().write(tmp_path / "graph.pb")
    with opened(convert(read_graph(path))) as converted:
        got = converted.features(IMAGES)
    expected = Computed(path)
    for i, image in enumerate(IMAGES.astype(np.float64)):
        np.testing.assert_allclose(got.pool[i], expected.value("pool_3", image).ravel(), rtol=0, atol=1e-5)
        spatial = expected.value("mixed_6/conv", image)[..., :SPATIAL_CHANNELS]
        assert got.spatial is not None
        np.testing.assert_allclose(got.spatial[i], spatial.ravel(), rtol=0, atol=1e-5)


def test_equal_graphs_give_equal_bytes(converted_file: Callable[[GraphFile], bytes]) -> None:
    once = converted_file(tiny())
    assert converted_file(tiny()) == once != converted_file(varied())


def test_the_file_is_plain_onnx(converted_file: Callable[[GraphFile], bytes]) -> None:
    model = onnx.load_model_from_string(converted_file(tiny()))
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {
        *("AveragePool", "Cast", "Concat", "Conv", "Flatten", "MaxPool", "Mul", "Relu", "Resize", "Slice", "Sub"),
        "Transpose",
    }


def test_operations_are_counted(converted_file: Callable[[GraphFile], bytes]) -> None:
    """Against the shapes that onnx infers."""
    model = onnx.load_model_from_string(converted_file(tiny()))
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 24, 24, 3), strict=True):
        dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info
    }
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    counted = sum(
        2 * np.prod(weights[node.input[1]]) * np.prod(shapes[node.output[0]][2:])
        for node in model.graph.node
        if node.op_type == "Conv"
    )
    facts = NetworkFacts.from_entries({entry.key: entry.value for entry in model.metadata_props})
    assert facts.operations_per_image == counted > 0


def test_the_published_number_of_operations(converted: bytes) -> None:
    """Inception v3 has 5.7 billion multiplications for an image."""
    model = onnx.load_model_from_string(converted)
    facts = NetworkFacts.from_entries({entry.key: entry.value for entry in model.metadata_props})
    assert facts.operations_per_image == 11_422_336_192


def refused(converted_file: Callable[[GraphFile], bytes], graph: GraphFile, named: str) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        converted_file(graph)
    assert named in refusal.value.got


@pytest.mark.parametrize("operation", ["LRN", "Conv2DBackpropInput", "ReadFile", "Unknown\n"])
def test_unknown_operations(operation: str, converted_file: Callable[[GraphFile], bytes]) -> None:
    graph = tiny()
    graph.change("mixed_6/tower_2/pool", operation=operation)
    refused(converted_file, graph, "mixed_6/tower_2/pool")


def test_unknown_operations_elsewhere_do_not_matter(converted_file: Callable[[GraphFile], bytes]) -> None:
    graph = tiny()
    graph.change("softmax", operation="LRN")
    graph.change("conv/CheckNumerics", operation="LRN")  # only a control input names it
    assert converted_file(graph)


ATTRIBUTES: dict[str, tuple[str, str, bool | int | float | bytes | list[int]]] = {
    "align_corners": ("ResizeBilinear", "align_corners", True),
    "half pixels": ("ResizeBilinear", "half_pixel_centers", True),
    "dilations": ("conv/Conv2D", "dilations", [1, 2, 2, 1]),
    "layout": ("conv/Conv2D", "data_format", b"NCHW"),
    "padding": ("pool", "padding", b"EXPLICIT"),
    "padding of another kind": ("pool", "padding", 1),
    "strides of channels": ("conv/Conv2D", "strides", [1, 1, 1, 2]),
    "no stride": ("conv/Conv2D", "strides", [1, 0, 1, 1]),
    "three strides": ("pool", "strides", [1, 2, 2]),
    "a large window": ("pool", "ksize", [1, 50, 50, 1]),
    "a huge window": ("pool", "ksize", [1, 2**40, 2**40, 1]),
    "negative epsilon": ("conv/batchnorm", "variance_epsilon", -100.0),
    "not a number": ("conv/batchnorm", "variance_epsilon", float("nan")),
    "pool of several pixels": ("pool_3", "ksize", [1, 4, 4, 1]),
    "transposed head": ("softmax/logits/MatMul", "transpose_b", True),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attributes_without_a_rule(case: str, converted_file: Callable[[GraphFile], bytes]) -> None:
    graph = tiny()
    name, key, value = ATTRIBUTES[case]
    graph.set_attribute(name, key, value)
    refused(converted_file, graph, name)


INPUTS = {  # operation, node and inputs, and a part of the message
    "circle": ("Relu", "mixed_6/conv", ["pool_3"], "pool_3"),
    "itself": ("Relu", "mixed_6/conv", ["mixed_6/conv"], "itself"),
    "missing": ("Relu", "mixed_6/conv", ["nothing"], "nothing"),
    "second output": ("Relu", "mixed_6/conv", ["pool:1"], "pool:1"),
    "none": ("Relu", "mixed_6/conv", [], "0 inputs"),
    "two": ("Relu", "mixed_6/conv", ["pool", "pool"], "2 inputs"),
    "a constant": ("Relu", "mixed_6/conv", ["conv/batchnorm/beta"], "constant input"),
    "norm after no convolution": ("Identity", "conv/Conv2D", ["Mul"], "conv/batchnorm"),
    "weights that depend on the images": ("Conv2D", "conv/Conv2D", ["Mul", "Mul"], "depends on the images"),
    "weights of another shape": ("Conv2D", "conv/Conv2D", ["Mul", "mixed_6/conv/conv2d_params"], "(1, 1, 8, 8)"),
    "axis alone": ("Concat", "mixed_6/join", ["mixed_6/join/concat_dim"], "1 inputs"),
    "images of two sizes": ("Concat", "mixed_6/join", ["mixed_6/join/concat_dim", "pool", "conv"], "sizes"),
    "another axis": ("Concat", "mixed_6/join", ["ExpandDims/dim", "pool"], "axis 0"),
    "head of one input": ("MatMul", "softmax/logits/MatMul", ["pool_3/_reshape"], "matrix product"),
    "head of another shape": ("MatMul", "softmax/logits/MatMul", ["pool_3", "conv/conv2d_params"], "(3, 3, 3, 8)"),
    "no head": ("Identity", "softmax/logits/MatMul", ["pool_3"], "matrix product"),
    "pixels that are not resized": ("Conv2D", "conv/Conv2D", ["ExpandDims", "conv/conv2d_params"], "0 x 0"),
    "a size that depends on the images": ("ResizeBilinear", "ResizeBilinear", ["ExpandDims"] * 2, "ResizeBilinear"),
    "no constant": ("Const", "conv/conv2d_params", [], "value"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_without_a_rule(case: str, converted_file: Callable[[GraphFile], bytes]) -> None:
    graph = tiny()
    operation, name, inputs, named = INPUTS[case]
    changes = {"attributes": {}} if operation == "Const" else {}
    graph.change(name, operation=operation, inputs=tuple(inputs), **changes)
    refused(converted_file, graph, named)


@pytest.mark.parametrize("name", ["ExpandDims", "pool_3", "mixed_6/conv", "softmax/logits/MatMul", "softmax/weights"])
def test_missing_nodes(name: str, converted_file: Callable[[GraphFile], bytes]) -> None:
    graph = tiny()
    graph.nodes = [node for node in graph.nodes if node.name != name]
    refused(converted_file, graph, name)


@pytest.mark.parametrize(("beta", "mean"), [(np.inf, 0), (np.nan, 0), (3e38, -3e38)])
def test_weights_that_are_not_finite(beta: float, mean: float, converted_file: Callable[[GraphFile], bytes]) -> None:
    """Those of the last case are finite, but not with the normalisation."""
    graph = tiny()
    for name, number in (("beta", beta), ("moving_mean", mean)):
        graph.replace(constant_of(f"conv/batchnorm/{name}", FLOAT, tensor_of(FLOAT, (8,), floats([number]))))
    refused(converted_file, graph, "conv/batchnorm")


def test_a_deep_graph(converted_file: Callable[[GraphFile], bytes]) -> None:
    """Nodes are not followed by recursion."""
    graph = tiny()
    last = "pool"
    for i in range(3000):
        last = graph.node("Identity", f"pass{i}", last)
    graph.change("mixed_6/tower_2/pool", inputs=(last,))
    assert converted_file(graph)


def test_too_many_weights(converted_file: Callable[[GraphFile], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar_evaluation.network.onnx_writer.MOST_BYTES", 1000)
    refused(converted_file, tiny(), "conv/batchnorm")
