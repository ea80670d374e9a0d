"""Compare two backends on the same inputs, graph by graph and output by output.

The proof shows whether a backend is right. This comparison shows where a backend begins to differ, keys and values
included. Polygraphy runs both backends. The outputs of the first backend are the inputs of the next scale of both.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Bundle
from flexvar_runtime.backends import require_precision
from flexvar_runtime.backends.base import Backend, Graph
from flexvar_runtime.bundle.certificate import compared_files
from flexvar_runtime.bundle.manifest import PSNR, ParityRecord, ParityRow
from flexvar_runtime.errors import BackendUnavailable, InvalidInput
from flexvar_runtime.generation.generator import Generator
from flexvar_runtime.generation.host import HostLoop
from flexvar_runtime.generation.opening import open_generator
from flexvar_runtime.model.precision import Precision
from flexvar_runtime.model.signatures import CONDITION, DECODE, ENCODE, STEP
from flexvar_runtime.model.tensors import TensorSpec, host_dtype
from flexvar_runtime.request import Request

from .parity import GATES, joined_modulation, psnr, relative_error
from .proof import Case, Proof

TWICE = 6.0  # dB: an error twice as large
Arrays = dict[str, NDArray[Any]]


def cross_check(bundle: Bundle, proof: Proof, first: Backend, second: Backend) -> ParityRecord:
    """Compare every output of every graph on `second` with `first`, teacher-forced over the first case of the proof.

    Bounds are twice those of the proof, because both backends differ from the reference. Images in half precision are
    compared by PSNR, with a bound 6 dB below that of the proof. All other outputs are compared by relative error.

    Raises InvalidInput for a bf16 bundle, because NumPy has no bfloat16. Raises BackendUnavailable where a backend does
    not run the precision, or Polygraphy is not installed.
    """
    if first.device is not None:
        raise InvalidInput(
            f"--against {first.name} keeps its arrays on the GPU, but the comparison needs them on the host.",
            expected="a backend of the CPU",
            fix="Use --against ort-cpu.",
        )
    if bundle.manifest.precision is Precision.BF16:
        raise InvalidInput(
            "--against cannot compare a bf16 bundle, because NumPy has no bfloat16.",
            expected="a bundle of another precision",
            fix="Leave --against out to compare with the reference.",
        )
    require_precision(second.name, bundle.manifest.precision, second.precisions)
    generator = open_generator(bundle, first)
    others: dict[str, Graph] = {}
    try:
        rows: list[ParityRow] = []
        gate = GATES[bundle.manifest.precision]
        for graph, scale, feed in _feeds(generator, proof, second.labels_per_run):
            if graph not in others:
                others[graph] = second.open(bundle, graph)
            got = _run_both([(first, generator.graph(graph)), (second, others[graph])], feed)
            if graph == CONDITION:
                got = [joined_modulation(outputs, generator.model.depth) for outputs in got]
            for name, exact in got[0].items():
                pair = got[1][name].astype(np.float32), exact.astype(np.float32)
                if graph == DECODE and bundle.manifest.precision.of(graph).half:
                    metric, value, bound = PSNR, psnr(*pair), gate.psnr - TWICE
                else:
                    metric, value, bound = "relative_error", relative_error(*pair), 2 * gate.error(graph)
                row = ParityRow(graph=graph, scale=scale, output=name, metric=metric, value=value, bound=bound)
                rows.append(row)
    finally:
        for opened in others.values():
            opened.close()
        generator.close()
        second.close()
    return ParityRecord(
        backend=f"{second.name} against {first.name}",
        emulated=False,
        passed=all(row.holds for row in rows),
        rows=tuple(rows),
        free_running_agreement=None,
        files=compared_files(bundle.manifest),
    )


def _feeds(generator: Generator, proof: Proof, labels: int) -> Iterator[tuple[str, str | None, Arrays]]:
    """(graph, scale, inputs) in the order of a generation that runs on the first backend."""
    case: Case = proof.cases[0]
    yield CONDITION, None, {"labels": np.resize(np.array(proof.labels, np.int32), labels)}
    with generator.loop(Request.of(case.labels, case.schedule, case.guidance)) as loop:
        assert isinstance(loop, HostLoop)  # the first backend's arrays lie on the host
        previous = None
        for i, (h, w) in enumerate(case.schedule):
            inputs = loop.inputs(i, previous)
            yield STEP, f"{i + 1}/{len(case.schedule)} ({h}x{w})", {name: np.array(a) for name, a in inputs.items()}
            loop.logits(i, previous)
            previous = case.tokens[i]
    h, w = case.schedule[-1]
    yield DECODE, f"{h}x{w}", {"tokens": case.tokens[-1]}
    yield ENCODE, None, {"image": proof.image}


def _run_both(pair: list[tuple[Backend, Graph]], feed: Arrays) -> list[Mapping[str, NDArray[Any]]]:
    """The outputs of both graphs, by name."""
    comparator = _polygraphy("polygraphy.comparator").Comparator
    runners = [_runner(backend, graph) for backend, graph in pair]
    logger = _polygraphy("polygraphy.logger").G_LOGGER
    with logger.verbosity(logger.CRITICAL):
        results = comparator.run(runners, data_loader=[feed])
    return [iterations[0] for _, iterations in results.items()]


def _runner(backend: Backend, graph: Graph) -> Any:
    """A Polygraphy runner of a graph."""
    base: Any = _polygraphy("polygraphy.backend.base").BaseRunner
    metadata = _polygraphy("polygraphy.common").TensorMetadata

    class Runner(base):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            described = metadata()
            for tensor in graph.spec.inputs:
                described.add(
                    tensor.name, host_dtype(tensor.dtype), [a if isinstance(a, int) else -1 for a in tensor.axes]
                )
            return described

        def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            inputs = {name: backend.upload(array) for name, array in feed_dict.items()}
            outputs = {
                tensor.name: backend.empty(_shape(graph, tensor, feed_dict), tensor.dtype)
                for tensor in graph.spec.outputs
            }
            graph.run(inputs, outputs)
            self.inference_time = 0.0  # Polygraphy requires it
            return {name: np.array(backend.download(array)) for name, array in outputs.items()}

    return Runner(name=backend.name)


def _shape(graph: Graph, output: TensorSpec, feed: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """The shape of an output, derived from the shapes of the inputs."""
    sizes: dict[str, int] = {}
    for tensor in graph.spec.inputs:
        for axis, length in zip(tensor.axes, feed[tensor.name].shape, strict=True):
            if isinstance(axis, str):
                base, _, factor = axis.partition("_x")
                sizes[base] = length // int(factor or 1)
    return output.shape(sizes)


def _polygraphy(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"--against needs the module {error.name}, which is not installed.",
            expected="Polygraphy",
            fix="Run: pip install 'flexvar-deploy[export]'",
        ) from error
