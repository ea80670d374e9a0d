"""Every launch of a published model, without running one: shapes, bounds, alignment and aliasing.

The device has addresses but no memory. Kernels say in their source which arrays they write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cublaslt import FakeCublasLt
from fake_cudnn import FakeCudnn
from fakes import FakeDevice
from numpy.typing import NDArray

from flexvar_export.modules import Condition, Decode, Encode, Step
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_ref.config import TokenizerConfig, TransformerConfig
from flexvar_runtime import ScaleSchedule
from flexvar_runtime.backends.cuda import autoencoder_layers, autoencoder_weights, condition, transformer
from flexvar_runtime.backends.cuda.backend import WORKSPACE_BYTES, Cuda
from flexvar_runtime.backends.cuda.parameters import Parameter
from flexvar_runtime.cuda import attention, layers
from flexvar_runtime.cuda.arena import nbytes
from flexvar_runtime.cuda.array import DeviceArray, aligned
from flexvar_runtime.cuda.launches import Launch
from flexvar_runtime.cuda.layers import LayerConfig
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.signatures import CONDITION, DECODE, ENCODE, STEP, graph_specs

DEFAULT, LARGE = "1_2_3_4_5_6_8_10_13_16", "1_2_3_4_5_6_7_8_9_10_12_14_16_23_32"
SOURCE = LayerConfig("float16", 1024, 16, 32).source
WRITTEN = {  # kernel to whether it writes each of its pointers
    name: ["const" not in one for one in text.split(",") if "*" in one]
    for name, text in re.findall(r"^KERNEL\(\w+\)\s+(\w+)\(([^)]*)\)", SOURCE, re.MULTILINE)
}
IN_PLACE = {("add_maps", 0, 2)}  # kernels that may write what they read, and the numbers of both pointers
FUNCTIONS = [(layers, name) for name in dir(layers) if name in LayerConfig.names] + [(attention, "attention")]


@dataclass
class VirtualBlock:
    address: int
    nbytes: int
    used: bool = True

    def check_guards(self) -> None:
        """There is no memory to check."""


class VirtualDevice(FakeDevice):
    """A device of 80 GB with addresses but no memory. It runs nothing."""

    def allocate(self, nbytes: int) -> Any:
        last = self.blocks[-1] if self.blocks else SimpleNamespace(address=2**40, nbytes=0)
        block: Any = VirtualBlock(last.address + aligned(last.nbytes) + 4096, nbytes)
        self.blocks.append(block)
        assert sum(one.nbytes for one in self.blocks) < 80e9
        return block

    def write(self, array: DeviceArray, host: NDArray[Any]) -> None:
        assert (host.nbytes, host.dtype.itemsize) == (array.nbytes, array.nbytes // array.size)

    def launch(self, launch: Launch) -> None:
        self.note(launch.name)

    def enqueue(self, event: str, work: Callable[[], None]) -> None:
        self.note(event)

    def inside(self, array: DeviceArray) -> bool:
        return any(
            block.address <= array.address and array.address + array.nbytes <= block.address + block.nbytes
            for block in self.blocks
        )


@dataclass(frozen=True)
class Made:
    """A launch and the arrays that it was made from."""

    launch: Launch
    arrays: tuple[DeviceArray, ...]

    def operands(self) -> Iterator[tuple[int, DeviceArray, bool]]:
        """Number of a pointer, its array, and whether the kernel writes it."""
        pointers = [argument for argument in self.launch.args if isinstance(argument, int)]
        assert len(pointers) == len(WRITTEN[self.launch.name])
        for number, (pointer, written) in enumerate(zip(pointers, WRITTEN[self.launch.name], strict=True)):
            if pointer:
                yield number, max((a for a in self.arrays if a.address == pointer), key=lambda a: a.nbytes), written


def arrays_in(value: Any) -> Iterator[DeviceArray]:
    if isinstance(value, DeviceArray):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from arrays_in(one)
    elif is_dataclass(value):
        for name in vars(value):
            yield from arrays_in(getattr(value, name))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """Every launch that is made from here on."""
    found: list[Made] = []
    for module, name in FUNCTIONS:
        real = getattr(module, name)

        def record(*positional: Any, _real: Any = real, **named: Any) -> Launch:
            launch: Launch = _real(*positional, **named)
            found.append(Made(launch, tuple(arrays_in([*positional, *named.values()]))))
            return launch

        monkeypatch.setattr(module, name, record)
    return found


def modules(depth: int) -> dict[str, Any]:
    """The exporter's modules of a published model on torch's device without memory."""
    import torch

    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
        model = FlexVAR(TransformerConfig.published(depth), tokenizer.codebook_VD)
        half = torch.float16
        return {
            CONDITION: Condition(model, half),
            STEP: Step(model, half),
            DECODE: Decode(tokenizer, half),
            ENCODE: Encode(tokenizer, half),
        }


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, Parameter]]:
    """Graph to its parameters by name: of the right types and shapes, without memory."""
    kinds = {"torch.float32": ("float32", np.float32), "torch.float16": ("float16", np.float16)}

    def parameter(value: Any) -> Parameter:
        dtype, kind = kinds[str(value.dtype)]
        return Parameter(np.broadcast_to(np.zeros((), kind), tuple(value.shape)), dtype)

    return {
        graph: {name: parameter(value) for name, value in module.state_dict().items()}
        for graph, module in modules(16).items()
    }


@pytest.fixture
def graphs(stored: dict[str, dict[str, Parameter]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The opened graphs of d16 and their backend, on a device without memory."""
    model = ModelFacts.published(16)
    precision: Any = SimpleNamespace(dtype="float16")
    manifest = SimpleNamespace(model=model, precision=precision, decoder="plain", graphs={}, float32_parts=())
    bundle: Any = SimpleNamespace(
        manifest=manifest,
        sha256="0",
        unchanged=nullcontext,
        graph=lambda name: graph_specs(model, "fp16")[name],
    )
    for module in (condition, transformer, autoencoder_weights):
        monkeypatch.setattr(module, "read", lambda bundle, graph, names: {name: stored[graph][name] for name in names})
    monkeypatch.setattr(condition, "match", lambda bundle, graph, names: dict.fromkeys(names))
    monkeypatch.setattr(transformer, "match", lambda bundle, graph, names: dict.fromkeys(names))

    def match_layers(bundle: Any, graph: str) -> Any:
        root = "decoder" if graph == DECODE else "encoder"
        found = autoencoder_layers.find_layers(root, stored[graph], "plain")
        names = autoencoder_layers.parameter_names(graph, found)
        assert set(names) == set(stored[graph])
        return found, dict.fromkeys(names)

    monkeypatch.setattr(autoencoder_weights, "match_layers", match_layers)
    device = VirtualDevice(lambda kernels: pytest.fail("nothing runs"))
    monkeypatch.setattr(device, "load", lambda kernels: None)
    device.activate()
    backend = Cuda(device, FakeCublasLt(device, needs=WORKSPACE_BYTES), FakeCudnn(device, needs=WORKSPACE_BYTES))
    return {graph: backend.open(bundle, graph) for graph in stored} | {"backend": backend}


def run(graphs: dict[str, Any], graph: str, sizes: dict[str, int], **given: DeviceArray) -> list[str]:
    """Bind a graph to arrays of these sizes, and enqueue it. Returns the names of its operations."""
    backend, spec = graphs["backend"], graphs[graph].spec
    inputs, outputs = (
        {tensor.name: given.get(tensor.name) or backend.empty(tensor.shape(sizes), tensor.dtype) for tensor in tensors}
        for tensors in (spec.inputs, spec.outputs)
    )
    bound = graphs[graph].bind(inputs, outputs)
    bound.run()
    return [operation.name for operation in bound.operations]


def check(made: list[Made], device: VirtualDevice) -> None:
    for one in made:
        name, (x, y, z) = one.launch.name, one.launch.grid
        assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, one
        operands = list(one.operands())
        for number, array, written in operands:
            assert device.inside(array) and array.address % 16 == 0, (name, number)
            for other, second, _ in operands if written else ():
                apart = (
                    second.address >= array.address + array.nbytes or second.address + second.nbytes <= array.address
                )
                assert apart or other == number or (name, other, number) in IN_PLACE, (name, number, other)


@pytest.mark.parametrize(("schedule", "B"), [(DEFAULT, 1), (DEFAULT, 64), (LARGE, 8)])
def test_every_launch_of_the_transformer(schedule: str, B: int, graphs: dict[str, Any], made: list[Made]) -> None:
    scales, backend = ScaleSchedule.parse(schedule), graphs["backend"]
    N, model = 2 * B, ModelFacts.published(16)
    caches = [backend.empty((scales.tokens, N, 16, 64), "float16") for _ in range(2 * model.depth)]
    past = 0
    for h, w in scales:
        L = h * w
        sizes = {"sequences": N, "images": B, "new": L, "past": past}
        names = [f"{part}_{i}" for part in "kv" for i in range(model.depth)]
        views = {f"past_{name}": cache[:past] for name, cache in zip(names, caches, strict=True)}
        views |= {f"new_{name}": cache[past : past + L] for name, cache in zip(names, caches, strict=True)}
        found = run(graphs, STEP, sizes, **views)
        assert len(found) == 8 * model.depth + 3
        few = past + L <= attention.FEW_TOKENS
        assert found.count("attention_rows" if few else "attention") == model.depth
        past += L
    check(made, backend.device)
    assert len(made) == len(scales) * (4 * model.depth + 2)
    assert backend.scratch._block.nbytes == nbytes(
        transformer.scratch_fields(model, "float16", False, N, scales.largest)
    )


@pytest.mark.parametrize(("B", "h", "w"), [(1, 16, 16), (8, 16, 16), (8, 32, 32), (1, 3, 5)])
def test_every_launch_of_the_decoder_and_the_encoder(
    B: int, h: int, w: int, graphs: dict[str, Any], made: list[Made]
) -> None:
    sizes = {"images": B, "height": h, "width": w}
    decoded = run(graphs, DECODE, sizes)
    assert sum(name.startswith("convolution") for name in decoded) == 51
    encoded = run(graphs, ENCODE, sizes)
    check(made, graphs["backend"].device)
    for found in (decoded, encoded):
        assert found.count("group_statistics") == found.count("group_normalise")
    assert decoded.count("group_statistics") == 39
    assert graphs["backend"].convolutions.substituted == []


def test_every_launch_of_the_condition(graphs: dict[str, Any], made: list[Made]) -> None:
    found = run(graphs, CONDITION, {"labels": 16})
    assert found[0] == "class_rows" and len(found) == 1 + 16 * 6 + 2
    check(made, graphs["backend"].device)
