"""Trains the classifier of scenes and writes it as a feature network, for `flexvar evaluate` and the demo's evaluation.

    python demo/scene_network.py runs/quality --scenes 2000

The network is `scenes.onnx` in that folder, in the form of `evaluation/network/contract.py`. Training takes some
minutes; a classifier that is in the folder is not trained again. `--scenes` also writes real scenes as an `.npz` file
with the array `arr_0`, for `flexvar evaluate reference`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from rich.console import Console
from scene_classifier import (
    EPOCHS,
    LONGEST,
    REFERENCE_SEED,
    SCENES,
    SIDE,
    WIDTHS,
    Pixels,
    Say,
    SceneClassifier,
    real,
    trained,
)
from torch import nn

from flexvar_evaluation.network.contract import IMAGES, POOL, Head, NetworkFacts, complete_model
from flexvar_evaluation.runs.pixels_npz import write_pixels_npz
from flexvar_runtime.files.atomic import atomic_write

NAME, CONVERSION = "scenes", "scenes-1"
CLASSIFIER, NETWORK = "classifier.safetensors", "scenes.onnx"
_OPSET, _IR_VERSION = 20, 10
_BLOCK = 256  # scenes drawn at once

Array = NDArray[Any]


def network_file(work: Path, count: int = SCENES, epochs: int = EPOCHS, say: Say = lambda _: None) -> Path:
    """Write the classifier in `work` as a feature network there. It is trained first if it is not there."""
    classifier = trained(work / CLASSIFIER, count, epochs, say)
    source = hashlib.sha256((work / CLASSIFIER).read_bytes()).hexdigest()
    with atomic_write(work / NETWORK, force=True) as partial:
        partial.write_bytes(feature_network(classifier, source).SerializeToString())
    return work / NETWORK


def write_scenes(path: Path, seed: int, count: int, size: tuple[int, int]) -> None:
    """Write scenes of `size` (height, width) as the array `arr_0` of an `.npz` file. An existing file is replaced."""

    def blocks() -> Iterator[Pixels]:
        for start in range(0, count, _BLOCK):
            yield real(seed, min(_BLOCK, count - start), size, start)[0]

    write_pixels_npz(path, blocks(), (count, *size, 3), force=True)


def feature_network(classifier: SceneClassifier, source_sha256: str) -> onnx.ModelProto:
    """A classifier as a feature network without spatial features. source_sha256: of the file of its weights."""
    layers, weights = _layers(classifier)
    nodes = "\n".join([_START, _averaging("height"), _averaging("width"), _SCALE, *layers])
    model = onnx.parser.parse_model(
        f'<ir_version: {_IR_VERSION}, opset_import: ["" : {_OPSET}]>\n'
        f"{NAME} (uint8[N, H, W, 3] {IMAGES}) => (float[N, {WIDTHS[-1]}] {POOL}) {{\n{nodes}\n}}"
    )
    constants = _CONSTANTS | weights
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    head = Head(_array(classifier.head.weight).T, _array(classifier.head.bias))
    complete_model(model, NetworkFacts(name=NAME, source_sha256=source_sha256, conversion=CONVERSION), head)
    onnx.checker.check_model(model, full_check=True)
    return model


def _layers(classifier: SceneClassifier) -> tuple[list[str], dict[str, Array]]:
    """The nodes from the tensor `scaled` to the features, and the weights that they use by name."""
    nodes, weights, source = list[str](), dict[str, Array](), "scaled"
    for i in range(len(WIDTHS)):
        convolution, norm = classifier.layers[3 * i], classifier.layers[3 * i + 1]
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        own = {"kernel": convolution.weight, "bias": convolution.bias, "gain": norm.weight, "shift": norm.bias}
        own |= {"mean": norm.running_mean, "variance": norm.running_var}
        weights |= {f"{name}{i}": _array(tensor) for name, tensor in own.items()}
        nodes += [
            f"conv{i} = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> ({source}, kernel{i}, bias{i})",
            f"norm{i} = BatchNormalization <epsilon = {norm.eps}> (conv{i}, gain{i}, shift{i}, mean{i}, variance{i})",
            f"relu{i} = Relu (norm{i})",
        ]
        source = f"relu{i}"
    return [*nodes, f"means = GlobalAveragePool ({source})", f"{POOL} = Flatten (means)"], weights


def _array(tensor: torch.Tensor | None) -> Array:
    assert tensor is not None
    return np.ascontiguousarray(tensor.detach().numpy())


_CONSTANTS: dict[str, Array] = {
    "half_range": np.array(127.5, np.float32),
    "unit": np.array(1, np.float32),
    "zero": np.array([0]),
    "one": np.array([1]),
    "longest": np.array([LONGEST]),
    "two": np.array([2]),
    "side": np.array([SIDE]),
    "columns": np.array([1]),  # the axis of columns in a matrix
    "lowest": np.array(0),
    "highest": np.array(1),
    "ramp": np.arange(LONGEST, dtype=np.float32),
}
_START = f"""
bytes = Transpose <perm = [0, 3, 1, 2]> ({IMAGES})
float = Cast <to = {onnx.TensorProto.FLOAT}> (bytes)
halves = Div (float, half_range)
planes = Sub (halves, unit)
height = Shape <start = 1, end = 2> ({IMAGES})
width = Shape <start = 2, end = 3> ({IMAGES})
shorter = Min (height, width)
shorter_twice = Mul (shorter, two)
"""
_SCALE = """
rows_scaled = MatMul (height_matrix, planes)
width_matrix_turned = Transpose <perm = [1, 0]> (width_matrix)
scaled = MatMul (rows_scaled, width_matrix_turned)
"""


def _averaging(axis: str) -> str:
    """The nodes of the matrix `{axis}_matrix` (new, old), which scales an axis as interpolate(mode="area") does.

    New pixel i is the mean of the old pixels from `first`, floor(i * old / new), to `last`,
    floor(((i + 1) * old - 1) / new). If nothing is to be scaled, the matrix is the identity.
    """
    nodes = f"""
    @_wanted = Mul (@, side)
    @_wanted_twice = Mul (@_wanted, two)
    @_rounded = Add (@_wanted_twice, shorter)
    @_in_proportion = Div (@_rounded, shorter_twice)
    @_new = Min (@_in_proportion, longest)
    @_new_ramp = Slice (ramp, zero, @_new)
    @_new_column = Unsqueeze (@_new_ramp, columns)
    @_new_index = Cast <to = {onnx.TensorProto.INT64}> (@_new_column)
    @_old_ramp = Slice (ramp, zero, @)
    @_old_index = Cast <to = {onnx.TensorProto.INT64}> (@_old_ramp)
    @_begin = Mul (@_new_index, @)
    @_first = Div (@_begin, @_new)
    @_end = Add (@_begin, @)
    @_before_end = Sub (@_end, one)
    @_last = Div (@_before_end, @_new)
    @_after_first = Sub (@_old_index, @_first)
    @_before_last = Sub (@_last, @_old_index)
    @_nearer = Min (@_after_first, @_before_last)
    @_nearer_from_1 = Add (@_nearer, one)
    @_inside = Clip (@_nearer_from_1, lowest, highest)
    @_ones = Cast <to = {onnx.TensorProto.FLOAT}> (@_inside)
    @_counts = ReduceSum <keepdims = 1> (@_ones, columns)
    @_matrix = Div (@_ones, @_counts)
    """
    return nodes.replace("@", axis)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="Folder for the classifier and the network.")
    parser.add_argument("--scenes", type=int, help=f"Also write so many real scenes of {SIDE}x{SIDE} pixels.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of torch.")
    arguments = parser.parse_args()
    if arguments.scenes is not None and arguments.scenes < 1:
        parser.error(f"--scenes is {arguments.scenes}, but it must be at least 1.")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    written = [network_file(arguments.work, say=console.print)]
    if arguments.scenes is not None:
        written.append(arguments.work / f"scenes_{SIDE}x{SIDE}_{arguments.scenes}.npz")
        write_scenes(written[1], REFERENCE_SEED, arguments.scenes, (SIDE, SIDE))
    for path in written:
        console.print(str(path), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
