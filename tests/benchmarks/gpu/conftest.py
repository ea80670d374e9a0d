"""An emulated GPU, and what the reference says of the tiny model: both made once a session."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fakes import FakeDevice
from host_kernels import COMPILER, HostKernels

from flexvar_bench.gpu.random_models import default_guidance, random_model, schedule_of
from flexvar_export.proof import Proof, make_proof
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime.cuda.compilation import KernelSet


@pytest.fixture(scope="session")
def tiny_model() -> tuple[FlexVAR, Tokenizer]:
    """The model that the tiny bundles are exported from. Read-only."""
    return random_model("tiny")


@pytest.fixture(scope="session")
def proof(tiny_model: tuple[FlexVAR, Tokenizer]) -> Proof:
    return make_proof(*tiny_model, schedule_of("tiny"), default_guidance())


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[KernelSet], HostKernels]:
    """Our kernels for a configuration, compiled for the processor, each in a folder of its own."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    compiled: dict[KernelSet, HostKernels] = {}

    def of(config: KernelSet) -> HostKernels:
        if config not in compiled:
            compiled[config] = HostKernels(config, tmp_path_factory.mktemp("kernels"), block=64)
        return compiled[config]

    return of


@pytest.fixture
def device(kernels: Callable[[KernelSet], HostKernels]) -> FakeDevice:
    device = FakeDevice(kernels)
    device.activate()
    return device
