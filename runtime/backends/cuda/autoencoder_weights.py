"""The parameters of the decoder and the encoder, checked, laid out and copied to a device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ...bundle.manifest import PHASES, PLAIN, TRANSPOSED
from ...bundle.onnx_scan import StoredTensor
from ...bundle.opening import Bundle
from ...cuda.array import FLOAT32, DeviceArray
from ...cuda.device import Device
from ...cuda.layers import MOST_CHANNELS, MOST_GROUPS
from ...errors import ArtifactRefused, BackendUnavailable
from ...model.signatures import DECODE
from ..base import EXPORT_AGAIN
from .autoencoder_layers import Attention, Layer, Upsample, find_layers, parameter_names
from .parameters import Parameter, match, read, require, used_parameters
from .upload import upload

OUTPUT_CHANNELS = 8  # of the last convolution of the decoder, of which 3 are used: faster than 3
PIXEL_COLUMNS = 28  # numbers under a 3x3 kernel over 3 channels, rounded up to whole vectors
WIDE_LAYERS = ("encoder.conv_in", "quant_conv")  # convolutions in float32
_ROUNDINGS = {"float16": 2**-9, "bfloat16": 2**-6, FLOAT32: 2**-20}  # most relative error of a sum of two taps


@dataclass(frozen=True)
class Weights:
    """The parameters of a graph on a device, by the name of their layer.

    `NAME.weight` of a convolution is (O, R, S, I), `NAME.gain` and `NAME.bias` of a norm (C,) float32.
    """

    arrays: dict[str, DeviceArray]
    layers: tuple[Layer, ...]
    groups: int
    half: str


def match_layers(bundle: Bundle, graph: str) -> tuple[tuple[Layer, ...], dict[str, StoredTensor]]:
    """The layers of a graph and its stored parameters. Raises ArtifactRefused for a graph that has others."""
    used = {tensor.name for tensor in used_parameters(bundle, graph)}
    found = find_layers("decoder" if graph == DECODE else "encoder", used, bundle.manifest.decoder)
    stored = match(bundle, graph, parameter_names(graph, found))
    for name, tensor in stored.items():
        if name.endswith(".gain"):
            groups, channels = tensor.shape[0], int(np.prod(tensor.shape))
            if channels % 8 or channels > MOST_CHANNELS or not 0 < groups <= MOST_GROUPS:
                raise BackendUnavailable(
                    f"The backend cuda has no kernels for {channels} channels in {groups} groups, as in {name}.",
                    expected=f"channels in steps of 8 up to {MOST_CHANNELS}, and at most {MOST_GROUPS} groups",
                    fix="Use --backend ort-cuda for this model.",
                )
    return found, stored


def load(device: Device, bundle: Bundle, graph: str) -> Weights:
    """Lay out the parameters of a graph on a device. Raises ArtifactRefused, OutOfMemory."""
    found_layers, stored = match_layers(bundle, graph)
    found, half = read(bundle, graph, stored), bundle.manifest.precision.dtype
    for name, parameter in found.items():
        norm = name.endswith(".gain") or (name.endswith(".bias") and parameter.value.ndim == 3)
        wide = norm or name.startswith(WIDE_LAYERS)
        require(bundle, graph, name, parameter, parameter.value.shape, FLOAT32 if wide else half)
    parts: dict[str, Parameter] = {}
    groups = {parameter.value.shape[0] for name, parameter in found.items() if name.endswith(".gain")}
    for layer in found_layers:
        if isinstance(layer, Upsample):
            parts[f"{layer.name}.weight"] = Parameter(_plain_kernel(found, layer), found[_stored(layer)].dtype)
            bias = f"{layer.name}.conv.bias" if layer.form == PLAIN else f"{layer.name}.bias"
            parts[f"{layer.name}.bias"] = found[bias]
        elif isinstance(layer, Attention):
            for part in ("weight", "bias"):
                three = [found[_found_name(found, f"{layer.name}.{each}", part)] for each in "qkv"]
                value = np.concatenate([each.value for each in three])
                parts[f"{layer.name}.qkv.{part}"] = Parameter(value, three[0].dtype)
    for name, parameter in found.items():
        plain = re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
        if ".upsample." not in name:
            parts.setdefault(plain, parameter)
    if graph == DECODE:
        for part in ("weight", "bias"):
            parts[f"decoder.conv_out.{part}"] = _padded(parts[f"decoder.conv_out.{part}"], OUTPUT_CHANNELS)
    laid_out = {name: _lay_out(name, parameter) for name, parameter in parts.items()}
    if len(groups) != 1:
        counts = " and ".join(map(str, sorted(groups)))
        _refuse(bundle, graph, f"all group norms must have the same number of groups, and these have {counts}")
    with bundle.unchanged():
        return Weights(upload(device, laid_out), found_layers, groups.pop(), half)


def _lay_out(name: str, parameter: Parameter) -> Parameter:
    value = parameter.value
    if value.ndim == 4:
        value = value.transpose(0, 2, 3, 1)
    if name == "encoder.conv_in.weight":  # a matrix of products, because its columns are gathered by `im2col`
        value = value.reshape(len(value), -1)
        value = np.pad(value, ((0, 0), (0, PIXEL_COLUMNS - value.shape[1])))
    if name.endswith(".gain") or value.ndim == 3:  # of norms
        value = value.reshape(-1)
    return Parameter(np.ascontiguousarray(value), parameter.dtype)


def _padded(parameter: Parameter, outputs: int) -> Parameter:
    value = parameter.value
    missing = ((0, outputs - len(value)), *((0, 0) for _ in value.shape[1:]))
    return Parameter(np.pad(value, missing), parameter.dtype)


def _found_name(found: Mapping[str, Parameter], name: str, part: str) -> str:
    return f"{name}.conv.{part}" if f"{name}.conv.{part}" in found else f"{name}.{part}"


def _stored(layer: Upsample) -> str:
    """The name of a stored weight of an upsampling layer."""
    part = {PLAIN: "conv.weight", PHASES: "weight_00", TRANSPOSED: "weight"}[layer.form]
    return f"{layer.name}.{part}"


def _plain_kernel(found: Mapping[str, Parameter], layer: Upsample) -> NDArray[np.generic]:
    """The 3x3 kernel (O, I, 3, 3) of an upsampling layer.

    The other forms store taps and sums of taps: along each side t0, t1 + t2, t0 + t1 and t2. Tap 1 is computed as
    (t1 + t2) - t2, and rounded again. Raises ArtifactRefused if t0 + t1 is not the sum of the taps that result.
    """
    stored = found[_stored(layer)]
    if layer.form == PLAIN:
        return stored.value
    if layer.form == PHASES:
        kernels = [[found[f"{layer.name}.weight_{a}{b}"].float32() for b in range(2)] for a in range(2)]
        # (O, I, rows, columns), along each side: t0, t1 + t2, t0 + t1, t2
        taps = np.array(kernels).transpose(2, 3, 0, 4, 1, 5).reshape(*stored.value.shape[:2], 4, 4)
    else:  # (I, O, 4, 4), along each side: t2, t1 + t2, t0 + t1, t0
        taps = stored.float32().transpose(1, 0, 2, 3)[:, :, [3, 1, 2, 0]][..., [3, 1, 2, 0]]
    plain = _three(_three(taps, 2), 3)
    again = _four(_four(plain, 3), 2)
    if np.abs(again - taps).max() > 4 * _ROUNDINGS[stored.dtype] * np.abs(taps).max():
        raise ArtifactRefused(
            f"The backend cuda does not know the upsampling {layer.name}: its kernels are not those of one 3x3 kernel.",
            expected="a decoder as flexvar export writes it",
            fix=f"{EXPORT_AGAIN} Or use --backend ort-cuda.",
        )
    return stored.rounded(plain).value


def _three(taps: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """t0, t1 and t2 along an axis, from t0, t1 + t2, t0 + t1 and t2."""
    first, last_two, _, last = np.moveaxis(taps, axis, 0)
    return np.stack([first, last_two - last, last], axis)


def _four(plain: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """t0, t1 + t2, t0 + t1 and t2 along an axis, from t0, t1 and t2."""
    first, middle, last = np.moveaxis(plain, axis, 0)
    return np.stack([first, middle + last, first + middle, last], axis)


def _refuse(bundle: Bundle, graph: str, problem: str) -> NoReturn:
    file = bundle.graph(graph).file
    raise ArtifactRefused(f"{file}: {problem}.", expected="the layers of a tokenizer", fix=EXPORT_AGAIN)
