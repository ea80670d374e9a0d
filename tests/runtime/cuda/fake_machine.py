"""A machine with an emulated GPU and a fake TensorRT, on which a pipeline runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fakes import FakeDevice, fake_trt
from host_kernels import HostKernels

from flexvar_export.engine_profiles import profiles
from flexvar_export.engine_writer import lock_engine, write_engine
from flexvar_runtime import Bundle, FlexVARPipeline, ScaleSchedule
from flexvar_runtime.backends.tensorrt.backend import TensorRT
from flexvar_runtime.backends.tensorrt.engine_files import RECIPE, EngineId, PrecisionReport, graph_sha256
from flexvar_runtime.backends.tensorrt.library import TrtLibrary
from flexvar_runtime.model.signatures import GRAPHS

SCHEDULE = "1_2_3_4"
OTHER = "1_2x3_4x3_3x5"
MAX_BATCH = 12
REPORT = PrecisionReport(claimed="fp32", layers={}, fused_attention=0, share=1.0)


@dataclass
class Machine:
    """A bundle, a device, a library, and the folder with engines of the bundle for both schedules."""

    bundle: Bundle
    device: FakeDevice
    library: TrtLibrary
    engines: Path

    def open(self, shapes_kept: int | None = None) -> FlexVARPipeline:
        return FlexVARPipeline(self.bundle, TensorRT(self.library, self.device, self.engines), shapes_kept)


def make_machine(path: Path, host_kernels: Callable[..., HostKernels], folder: Path, receipts: Path) -> Machine:
    """Writes engines of the bundle at `path` into `folder`, and their receipts into `receipts`."""
    bundle = Bundle.open(path)
    device = FakeDevice(partial(host_kernels, block=64))
    device.engines = {}  # type: ignore[attr-defined]
    described: dict[bytes, tuple[Any, Any]] = {}
    library = TrtLibrary("tensorrt", fake_trt(device, described.__getitem__), "11.4.0")
    schedules = [ScaleSchedule.parse(SCHEDULE), ScaleSchedule.parse(OTHER)]
    for graph in GRAPHS:
        ranges = profiles(graph, schedules, MAX_BATCH, bundle.manifest.model)
        wanted = EngineId(
            graph=graph,
            graph_sha256=graph_sha256(bundle, graph),
            recipe=RECIPE,
            flavour="tensorrt",
            version="11.4.0",
            target="8.6",
            profiles=ranges,
        )
        plan = str(bundle.graph_file(graph)).encode()
        described[plan] = (ranges, bundle.graph(graph))
        with lock_engine(folder, wanted, receipts):
            write_engine(folder, wanted, plan, REPORT, receipts)
    return Machine(bundle, device, library, folder)
