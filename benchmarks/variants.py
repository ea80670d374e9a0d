"""The variants that are timed: backends of the runtime, and peers. Each one opens in its own process.

- `torch-eager`: the reference as published, in float32.
- `torch-bf16`: the reference with weights and activations in bfloat16.
- `torch-compile`: the reference with its blocks and decoder compiled.
- `ort-plain` and `openvino-plain`: the graphs of the bundle in ONNX Runtime and OpenVINO with their default settings,
  with plain arrays instead of bindings. OpenVINO then computes in bfloat16 if the processor has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexvar_runtime import Bundle, CostRow, FlexVARPipeline, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.backends import BACKENDS, CPU_BACKENDS
from flexvar_runtime.backends.loading import load_onnxruntime
from flexvar_runtime.backends.openvino.backend import shared_core
from flexvar_runtime.backends.ort.byte_products import make_exact
from flexvar_runtime.errors import BackendUnavailable, InvalidInput
from flexvar_runtime.model.guidance import UNGUIDED
from flexvar_runtime.model.noise import draws
from flexvar_runtime.model.sampling import sample
from flexvar_runtime.model.signatures import CONDITION, DECODE, STEP, TABLES_FILE, new_names, past_names
from flexvar_runtime.model.tables import Tables
from flexvar_runtime.model.tensors import host_dtype
from flexvar_runtime.pictures.pixels import to_uint8

from .energy import gpu_counter, joules_of_call

TORCH_PEERS = ("torch-eager", "torch-bf16", "torch-compile")
PLAIN_PEERS = ("ort-plain", "openvino-plain")
VARIANTS = (*BACKENDS, *TORCH_PEERS, *PLAIN_PEERS)
SEED = 0
Arrays = dict[str, NDArray[Any]]
RunGraph = Callable[[str, Mapping[str, NDArray[Any]]], Arrays]


@dataclass(frozen=True)
class Subject:
    """A variant with its files. transformer, vae, weights: the checkpoint as in `Model`, for the torch peers."""

    variant: str
    bundle: Path
    transformer: Path | None
    vae: Path | None
    threads: int
    weights: str | None = None


@dataclass(frozen=True)
class Work:
    """One call: images of the classes 0, 1, … with the bundle's default guidance or without guidance."""

    schedule: ScaleSchedule
    batch: int
    guided: bool

    def labels(self, classes: int) -> list[int]:
        return [i % classes for i in range(self.batch)]


@dataclass(frozen=True)
class CostWork:
    """Costs to measure for deadlines: the schedules of the bundle's quality order, at these batch sizes."""

    batches: tuple[int, ...]
    repeats: int


@dataclass(frozen=True)
class SavedCosts:
    """The file of saved costs, and the number of schedules and batch sizes that were just measured."""

    file: str
    rows: int


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, decoder included, and of its parts. None where the variant does not report a part."""

    total: float
    condition: float | None = None
    scales: tuple[float, ...] | None = None
    sampling: float | None = None
    decode: float | None = None


Caller = Callable[[Work], Sample]


@contextmanager
def opened(subject: Subject) -> Iterator[Caller]:
    """Open a variant. It opens unproved bundles too: `run_session` has refused those that are not allowed.

    Raises InvalidInput for an unknown variant and for a torch peer without a checkpoint, and BackendUnavailable.
    """
    if subject.variant not in VARIANTS:
        raise InvalidInput(
            f"The variant {subject.variant!r:.100} is unknown.",
            expected=f"one of {', '.join(VARIANTS)}",
            fix=f"Use one of: {', '.join(VARIANTS)}.",
        )
    if subject.variant in TORCH_PEERS:
        yield _torch_peer(subject)
    elif subject.variant in PLAIN_PEERS:
        yield _plain_peer(subject)
    else:
        threads = subject.threads if subject.variant in CPU_BACKENDS else None
        with FlexVARPipeline.from_bundle(
            subject.bundle, backend=subject.variant, threads=threads, allow_unproved=True
        ) as pipeline:
            yield RuntimeCaller(pipeline)


def default_guidance(bundle: Bundle, guided: bool) -> Guidance:
    defaults = bundle.manifest.defaults
    if not guided:
        return UNGUIDED
    return Guidance(defaults.guidance_scale, defaults.guidance_rule, defaults.max_side)


@dataclass(frozen=True)
class RuntimeCaller:
    """Calls the runtime. It can also measure the costs for deadlines."""

    pipeline: FlexVARPipeline

    def __call__(self, work: Work) -> Sample:
        guidance = default_guidance(self.pipeline.bundle, work.guided)
        times = self.pipeline(work.labels(self.pipeline.model.classes), work.schedule, guidance, seed=SEED).timings
        if times.mode != "steps":
            return Sample(times.total)
        steps = tuple(scale.step for scale in times.scales)
        return Sample(times.total, times.condition, steps, times.sampling, times.decode)

    def joules(self, work: Work) -> float | None:
        """The energy of one call on a GPU in joules. None on a processor, and if the GPU does not count it."""
        counter = None if self.pipeline.backend.device is None else gpu_counter()
        return None if counter is None else joules_of_call(lambda: self(work), counter)

    def save_costs(self, work: CostWork) -> SavedCosts:
        """Measure and save costs. The timed calls cannot serve: they repeat classes, whose conditions are cached."""
        rows: list[CostRow] = []
        table = self.pipeline.measure_costs(work.batches, repeats=work.repeats, on_row=rows.append)
        return SavedCosts(str(table.path()), len(rows))


def _torch_peer(subject: Subject) -> Caller:
    if subject.transformer is None or subject.vae is None:
        raise InvalidInput(
            f"The variant {subject.variant} needs the checkpoint of the bundle.",
            expected="the checkpoint of the bundle",
            fix="Pass --checkpoint FILE and --vae FILE",
        )
    try:
        import torch
    except ImportError as error:
        raise BackendUnavailable(
            "The module torch is not installed.",
            expected="the export extra",
            fix="Install it: pip install 'flexvar-deploy[export]'",
        ) from error
    import flexvar_ref
    from flexvar_export.proof import reference_options

    torch.set_num_threads(subject.threads)
    model, tokenizer = flexvar_ref.load(subject.transformer, subject.vae, weights=subject.weights)
    if subject.variant == "torch-bf16":
        model, tokenizer = model.to(torch.bfloat16), tokenizer.to(torch.bfloat16)
    if subject.variant == "torch-compile":
        for block in model.blocks:
            block.compile(dynamic=True)
        tokenizer.decoder.compile()
    bundle = Bundle.open(subject.bundle, allow_unproved=True)

    def make(work: Work) -> Sample:
        options = reference_options(default_guidance(bundle, work.guided), _sampling(bundle))
        start = time.perf_counter()
        scales = list(flexvar_ref.iter_scales(model, work.labels(model.config.classes), str(work.schedule), options))
        decoding = time.perf_counter()
        with torch.inference_mode():
            to_uint8(tokenizer.decode(scales[-1].tokens).float().numpy())
        end = time.perf_counter()
        return Sample(end - start, decode=end - decoding)

    return make


def _sampling(bundle: Bundle) -> Sampling:
    defaults = bundle.manifest.defaults
    return Sampling(defaults.top_k, defaults.top_p, defaults.greedy_scales, defaults.max_side)


@dataclass(frozen=True)
class PlainCaller:
    """Calls a peer on the graphs of the bundle. precision: the one that its library computes in."""

    bundle: Bundle
    tables: Tables
    run: RunGraph
    precision: str

    def __call__(self, work: Work) -> Sample:
        return _plain_sample(self.bundle, self.tables, self.run, work)


def _plain_peer(subject: Subject) -> PlainCaller:
    bundle = Bundle.open(subject.bundle, allow_unproved=True)
    run, precision = {"ort-plain": _onnx_runtime, "openvino-plain": _openvino}[subject.variant](bundle, subject.threads)
    return PlainCaller(bundle, Tables.load(bundle.file(TABLES_FILE), bundle.manifest.model), run, precision)


def _onnx_runtime(bundle: Bundle, threads: int) -> tuple[RunGraph, str]:
    onnxruntime = load_onnxruntime()
    options, provider = onnxruntime.SessionOptions(), "CPUExecutionProvider"
    options.intra_op_num_threads = threads
    if bundle.manifest.precision.of(STEP) == "int8":
        make_exact(onnxruntime, options)  # not for speed: without it products saturate, which changes the model
    with bundle.unchanged():
        sessions = {
            graph: onnxruntime.InferenceSession(str(bundle.graph_file(graph)), options, providers=[provider])
            for graph in (CONDITION, STEP, DECODE)
        }

    def run(graph: str, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        names = [tensor.name for tensor in bundle.graph(graph).outputs]
        return dict(zip(names, sessions[graph].run(names, dict(feeds)), strict=True))

    return run, bundle.manifest.precision


def _openvino(bundle: Bundle, threads: int) -> tuple[RunGraph, str]:
    try:
        core = shared_core()
    except ImportError as error:
        raise BackendUnavailable(
            "The module openvino is not installed.",
            expected="the openvino extra",
            fix="Install it: pip install 'flexvar-deploy[openvino]'",
        ) from error
    with bundle.unchanged():
        compiled = {
            graph: core.compile_model(str(bundle.graph_file(graph)), "CPU", {"INFERENCE_NUM_THREADS": threads})
            for graph in (CONDITION, STEP, DECODE)
        }

    def run(graph: str, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        results = compiled[graph](dict(feeds))
        outputs = bundle.graph(graph).outputs  # the library reports bfloat16 arrays as float16
        return {t.name: results[t.name].view(host_dtype(t.dtype)) for t in outputs}

    shapes = {t.name: [axis if isinstance(axis, int) else 1 for axis in t.axes] for t in bundle.graph(STEP).inputs}
    dtypes = {t.name: host_dtype(t.dtype) for t in bundle.graph(STEP).inputs}
    run(
        STEP, {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
    )  # a first call without a past gives wrong values
    hint = compiled[STEP].get_property("INFERENCE_PRECISION_HINT").get_type_name()  # f32: as the graph declares
    return run, {"bf16": "bf16", "f16": "fp16"}.get(hint, bundle.manifest.precision)


def _plain_sample(bundle: Bundle, tables: Tables, run: RunGraph, work: Work) -> Sample:
    """One call, written in the simplest way: the past is concatenated again at every scale."""
    model, B = bundle.manifest.model, work.batch
    sampling, labels = _sampling(bundle), work.labels(model.classes)
    branches = 2 if work.guided else 1
    start = time.perf_counter()
    every = np.array([*labels, *([model.null_class] * B if work.guided else [])], np.int32)
    condition = run(CONDITION, {"labels": every})
    modulation = {name: array for name, array in condition.items() if name != "first_input"}
    conditioned = time.perf_counter()
    rows = np.arange(B, dtype=np.int32)
    past_dtype = host_dtype(bundle.manifest.precision.dtype)
    past = {
        name: np.empty((0, branches * B, model.heads, model.head_size), past_dtype) for name in past_names(model.depth)
    }
    weights = default_guidance(bundle, work.guided).weights(work.schedule)
    steps, drawing, tokens = [], 0.0, np.empty((B, 1, 1), np.int32)
    for i, (h, w) in enumerate(work.schedule):
        began = time.perf_counter()
        if i == 0:
            codes = np.zeros((branches * B, 1, model.code_dim), np.float32)
            offset = condition["first_input"]
        else:
            codes = np.tile(tables.next_codes(tokens, (h, w)), (branches, 1, 1))
            offset = np.broadcast_to(tables.offset(h, w), (branches * B, h * w, model.width))
        feeds = {
            "codes": codes,
            "offset": np.ascontiguousarray(offset),
            **modulation,
            "cond_rows": rows,
            "uncond_rows": rows + (branches - 1) * B,
            "t": np.full(B, weights[i], np.float32),
            **past,
        }
        results = run(STEP, feeds)
        pairs = zip(past_names(model.depth), new_names(model.depth), strict=True)
        past = {old: np.concatenate((past[old], results[new])) for old, new in pairs}
        sampled = time.perf_counter()
        noise = np.concatenate([draws(SEED, b, i, h * w) for b in range(B)])
        logits = results["logits"].reshape(-1, model.vocabulary)
        tokens = sample(logits, noise, top_k=sampling.top_k_at(h, w), top_p=sampling.top_p).reshape(B, h, w)
        steps.append(sampled - began)
        drawing += time.perf_counter() - sampled
    decoding = time.perf_counter()
    to_uint8(run(DECODE, {"tokens": tokens})["image"], model.value_range)
    end = time.perf_counter()
    return Sample(end - start, conditioned - start, tuple(steps), drawing, end - decoding)
