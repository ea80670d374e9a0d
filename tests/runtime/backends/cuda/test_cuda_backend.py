"""The backend `cuda` on an emulated device: gates, captured generations, memory, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cuda_machine import CudaMachine, make_machine
from host_kernels import HostKernels

from flexvar_export.bundle import PUBLISHED_DEFAULTS, export_bundle
from flexvar_export.parity import GATES, compare
from flexvar_export.proof import Proof
from flexvar_export.upsampling import phase_kernels, transposed_kernel
from flexvar_ref import FlexVAR, load_tokenizer, save
from flexvar_ref.config import TransformerConfig
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, transformer_state, write_checkpoints
from flexvar_runtime import ArtifactRefused, Bundle, Guidance, InvalidInput, OutOfMemory
from flexvar_runtime.backends.cuda import autoencoder_weights, backend, condition, parameters, transformer
from flexvar_runtime.backends.cuda.autoencoder_layers import Upsample
from flexvar_runtime.backends.cuda.backend import Cuda
from flexvar_runtime.backends.cuda.parameters import Parameter, round_to
from flexvar_runtime.backends.device_arrays import probe_gpu
from flexvar_runtime.bundle.onnx_scan import StoredTensor
from flexvar_runtime.cuda.gpu import GpuFacts
from flexvar_runtime.errors import BackendUnavailable
from flexvar_runtime.generation.captured import WARM_UPS
from flexvar_runtime.generation.device import DeviceGenerator
from flexvar_runtime.model.signatures import GRAPHS

SCHEDULE = "1_2_3_4"
Bundles = Callable[[str], Path]


@pytest.fixture
def machine(tiny_bundles: Bundles, host_kernels: Callable[..., HostKernels]) -> CudaMachine:
    return make_machine(tiny_bundles("fp16"), host_kernels)


def failed(machine: CudaMachine) -> list[Any]:
    """Rows of the comparison with the reference that miss their gate. Every graph and scale has rows."""
    proof = Proof.load(machine.bundle.file("proof.npz"))
    with machine.open() as pipeline:
        rows = list(compare(pipeline.generator, proof, GATES[machine.bundle.manifest.precision]))
    assert {row.graph for row in rows} == set(GRAPHS)
    return [row for row in rows if not row.holds]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.kernels)])
def test_the_gates_hold(precision: str, tiny_bundles: Bundles, host_kernels: Callable[..., HostKernels]) -> None:
    assert failed(make_machine(tiny_bundles(precision), host_kernels)) == []


@pytest.mark.kernels
def test_the_gates_hold_without_cudnn(tiny_bundles: Bundles, host_kernels: Callable[..., HostKernels]) -> None:
    machine = make_machine(tiny_bundles("fp16"), host_kernels, plans=set())
    assert failed(machine) == [] and machine.cudnn.executed == []


@pytest.mark.kernels
@pytest.mark.parametrize("decoder", ["plain", "transposed"])
def test_the_gates_hold_for_parts_in_float32_and_every_form_of_the_decoder(
    decoder: str, tiny_checkpoint: tuple[Path, Path], tmp_path: Path, host_kernels: Callable[..., HostKernels]
) -> None:
    parts = ("blocks.0.attention", "blocks.1.mlp")
    export_bundle(*tiny_checkpoint, tmp_path / "b", precision="fp16", float32_parts=parts, decoder=decoder)
    machine = make_machine(tmp_path / "b", host_kernels)
    assert machine.bundle.manifest.float32_parts == parts and machine.bundle.manifest.decoder == decoder
    assert failed(machine) == []
    wide = [problem for problem in machine.cublaslt.executed if problem.a.dtype == "float32"]
    assert {(problem.a.rows, problem.a.columns) for problem in wide} >= {(384, 128), (512, 128), (128, 512)}


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_gates_hold_for_a_block_of_d16(
    precision: str, tmp_path: Path, host_kernels: Callable[..., HostKernels]
) -> None:
    sizes = TransformerConfig(depth=1, heads=16, classes=10, vocabulary=512, code_dim=8)
    _, vae = write_checkpoints(tmp_path, tiny_transformer(), TINY_TOKENIZER)
    model = FlexVAR(sizes, load_tokenizer(vae).codebook_VD)
    model.load_state_dict(transformer_state(sizes))
    save(model, tmp_path / "block.safetensors")
    checkpoint = tmp_path / "block.safetensors", vae
    defaults = replace(PUBLISHED_DEFAULTS, schedule="1_2_3_5_8")
    export_bundle(*checkpoint, tmp_path / "b", precision=precision, defaults=defaults)
    machine = make_machine(tmp_path / "b", host_kernels)
    assert machine.bundle.manifest.model.width == 1024
    assert failed(machine) == []


def test_a_generation_is_captured_and_replayed(machine: CudaMachine) -> None:
    options: dict[str, Any] = {"seed": 2**64 - 1, "first_index": 2**40}
    with machine.open() as pipeline:
        with machine.device.recorded() as events:
            first = pipeline([3, 1], SCHEDULE, **options)
        again = pipeline([3, 1], SCHEDULE, **options)
        assert first.timings.mode == again.timings.mode == "cuda-graph"
        np.testing.assert_array_equal(first.images, again.images)
        stepped = list(pipeline.iter_scales([3, 1], SCHEDULE, **options))
        for step, tokens in zip(stepped, first.tokens, strict=True):
            np.testing.assert_array_equal(step.tokens, tokens)
        np.testing.assert_array_equal(stepped[-1].preview(), first.images)
        other = pipeline([3, 1], SCHEDULE, Guidance(4.0, "constant"), seed=5)
        assert not np.array_equal(other.tokens[-1], first.tokens[-1])
    assert events.count("capture") == 1 and "allocate" not in events[events.index("capture") :]
    captured = events[events.index("capture") + 1 : events.index("captured")]
    step = ["embed", *BLOCK * 2, "guide_rows", "matmul", "sample_rows"]
    assert captured[: 2 * len(step) + 2] == ["zero", *step, "next_inputs", *step]
    assert events[: events.index("capture")].count("guide_rows") == WARM_UPS * 4


BLOCK = [
    *["modulate_rows", "matmul", "split_heads", "attention_rows", "matmul"],
    *["modulate_rows", "matmul", "matmul"],
]


def test_no_memory_grows(machine: CudaMachine) -> None:
    with machine.open() as pipeline:
        pipeline([0], SCHEDULE, seed=0)
        used = machine.device.used
        for seed in range(5):
            pipeline([seed], SCHEDULE, seed=seed)
            list(pipeline.iter_scales([seed], SCHEDULE, seed=seed))
        assert machine.device.used == used
    assert machine.device.reserved == 0 and machine.cublaslt.alive == {} and machine.cudnn.handles == {}


def test_a_request_that_does_not_fit_is_refused_before_it_runs(
    tiny_bundles: Bundles, host_kernels: Callable[..., HostKernels]
) -> None:
    """The working memory of the graphs is counted, so nothing is allocated that would not be enough."""
    needed = []
    for short in (0, 1000):
        machine = make_machine(tiny_bundles("fp16"), host_kernels)
        with machine.open() as pipeline:
            generator = pipeline.generator
            assert isinstance(generator, DeviceGenerator)
            for graph in ("condition", "step", "decode"):
                generator.graph(graph)
            pipeline.generator.condition([0])
            before = machine.device.used
            if not short:
                pipeline([0] * 6, SCHEDULE, seed=0)
                needed.append(machine.device.used - before)
                continue
            machine.device.size = before + needed[0] - short
            with machine.device.recorded() as events, pytest.raises(OutOfMemory, match=r"of 6 .* needs") as refusal:
                pipeline([0] * 6, SCHEDULE, seed=0)
            assert "allocate" not in events and "a batch of at most" in refusal.value.fix


def test_edits_run_in_one_pass_or_scale_by_scale(machine: CudaMachine) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    with machine.open() as pipeline, machine.device.recorded() as events:
        edited = pipeline.edit(picture, "refine", strength=0.5, size=(16, 16), schedule=SCHEDULE, seed=1)
    assert edited.images.shape == (1, 16, 16, 3) and "to_planes" in events


# --- which layers a graph has


def test_constants_of_the_exporter_may_be_in_the_file_of_weights(tiny_bundle: Path, bundle_copy: Path) -> None:
    """As in every bundle of a useful size, and here in the one in fp32. Other tensors of their names are parameters."""
    bundle, names = Bundle.open(tiny_bundle), transformer.parameter_names(2)
    ones = [tensor for tensor in bundle.scan("step").tensors if tensor.name.startswith("val_") and tensor.external]
    assert [tensor.shape for tensor in ones] == [(128,)]
    assert list(parameters.match(bundle, "step", names)) == list(names)
    autoencoder_weights.match_layers(bundle, "decode")
    with (bundle_copy / "step.onnx.data").open("r+b") as file:
        file.seek(int(dict(ones[0].external)["offset"]) + 8)
        file.write(b"\1")
    changed = replace(bundle, path=bundle_copy, files=None)
    with pytest.raises(ArtifactRefused, match=r"uses 'val_\d+' where blocks.0.q.weight is expected"):
        parameters.match(changed, "step", names)


def test_equal_parameters_are_stored_once(monkeypatch: pytest.MonkeyPatch, machine: CudaMachine) -> None:
    names = transformer.parameter_names(2)
    stored = [StoredTensor(name, 10, (1,)) for name in names]
    shared = names.index("blocks.1.k.bias")
    stored[shared] = stored[names.index("blocks.0.k.bias")]
    monkeypatch.setattr(parameters, "used_parameters", lambda bundle, graph: tuple(stored))
    found = parameters.match(machine.bundle, "step", names)
    assert found["blocks.1.k.bias"].name == "blocks.0.k.bias" and list(found) == list(names)


@pytest.mark.parametrize("change", ["swapped", "missing", "more", "renamed", "all renamed"])
def test_other_layers_are_refused(change: str, monkeypatch: pytest.MonkeyPatch, machine: CudaMachine) -> None:
    names = list(transformer.parameter_names(2))
    if change == "swapped":
        names[4], names[6] = names[6], names[4]
    elif change == "missing":
        del names[5]
    elif change == "renamed":
        names[5] = "surprise"
    elif change == "all renamed":
        names = [f"other.{i}" for i in range(len(names))]
    else:
        names.append("another.weight")
    stored = tuple(StoredTensor(name, 10, (1,)) for name in names)
    monkeypatch.setattr(parameters, "used_parameters", lambda bundle, graph: stored)
    with pytest.raises(ArtifactRefused, match=r"does not know step.onnx: it uses .*ort-cuda"):
        parameters.match(machine.bundle, "step", transformer.parameter_names(2))


def test_parameters_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch, machine: CudaMachine) -> None:
    """A kernel would read outside of them."""
    model = machine.bundle.manifest.model
    manifest = replace(machine.bundle.manifest, model=replace(model, vocabulary=model.vocabulary + 8))
    changed = replace(machine.bundle, manifest=manifest)
    with pytest.raises(ArtifactRefused, match=r"head.weight is float16 .* not float16 \(128, 520\)"):
        transformer.load(machine.device, changed)


def test_the_kernel_of_every_form_of_upsampling_is_recovered() -> None:
    import torch

    plain = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32))
    phases = phase_kernels(plain).float().numpy()
    forms: dict[str, dict[str, Any]] = {
        "plain": {"conv.weight": plain.numpy()},
        "phases": {f"weight_{a}{b}": phases[a, b] for a in range(2) for b in range(2)},
        "transposed": {"weight": transposed_kernel(plain).float().numpy()},
    }
    for dtype, bound in (("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)):
        for form, arrays in forms.items():
            found = {f"up.{name}": Parameter(round_to(value, dtype), dtype) for name, value in arrays.items()}
            got = Parameter(autoencoder_weights._plain_kernel(found, Upsample("up", form)), dtype).float32()
            assert np.linalg.norm(got - plain.numpy()) / np.linalg.norm(plain.numpy()) < bound, (form, dtype)


# --- refusals


def test_one_backend_runs_one_bundle(machine: CudaMachine, tiny_bundles: Bundles) -> None:
    opened = machine.backend()
    opened.open(machine.bundle, "condition")
    with pytest.raises(InvalidInput, match="runs a bundle with other sizes"):
        opened.open(Bundle.open(tiny_bundles("bf16")), "condition")


def test_a_binding_needs_all_outputs_and_an_open_graph(machine: CudaMachine) -> None:
    opened = machine.backend()
    graph = opened.open(machine.bundle, "condition")
    labels = opened.upload(np.zeros(16, np.int32))
    with pytest.raises(InvalidInput, match="bound without"):
        graph.bind({"labels": labels}, {"first_input": opened.empty((16, 1, 128), "float32")})
    sizes = {"labels": 16}
    outputs = {tensor.name: opened.empty(tensor.shape(sizes), tensor.dtype) for tensor in graph.spec.outputs}
    bound = graph.bind({"labels": labels}, outputs)
    bound.run()
    bound.close()
    with pytest.raises(InvalidInput, match="is closed"):
        bound.run()
    graph.close()
    with pytest.raises(InvalidInput, match="is closed"):
        graph.bind({"labels": labels}, outputs)
    machine.device.synchronize()


def test_keys_that_do_not_follow_the_past_are_refused(machine: CudaMachine) -> None:
    opened = machine.backend()
    graph = opened.open(machine.bundle, "step")
    sizes = {"sequences": 2, "images": 1, "new": 4, "past": 1}
    inputs, outputs = (
        {tensor.name: opened.empty(tensor.shape(sizes), tensor.dtype) for tensor in tensors}
        for tensors in (graph.spec.inputs, graph.spec.outputs)
    )
    with pytest.raises(InvalidInput, match="new_k_0 does not follow past_k_0"):
        graph.bind(inputs, outputs).run()


OLD, NEW = GpuFacts(0, "An old GPU", "7.5", 2**34), GpuFacts(1, "A new GPU", "9.0", 2**34)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[GpuFacts]:
    """The GPUs of a machine, whose libraries work."""
    found = [OLD, NEW]
    monkeypatch.setattr(backend, "find_gpus", lambda: tuple(found))
    monkeypatch.setattr(backend, "find_gpu", lambda device=None: found[int((device or "cuda:0")[-1])])
    monkeypatch.setattr(backend, "load_cublaslt", lambda: SimpleNamespace(get_version=lambda: 130100))
    monkeypatch.setattr(backend, "load_cudnn", lambda: SimpleNamespace(backend_version=lambda: 91900))
    return found


def test_each_gpu_is_judged_by_its_own_capability(gpus: list[GpuFacts], tiny_bundles: Bundles) -> None:
    state, bundle = backend.probe("cuda"), Bundle.open(tiny_bundles("fp16"))
    assert state.available and "A new GPU" in state.detail and "cuBLASLt 130100" in state.detail
    assert backend.ready("cuda", bundle, device="cuda:1", engines=None).available
    old = backend.ready("cuda", bundle, device="cuda:0", engines=None)
    assert not old.available and "7.5" in old.detail and "8.0" in old.detail
    gpus[1:] = []
    state = backend.probe("cuda")
    assert not state.available and "7.5" in state.detail and "ort-cuda" in (state.fix or "")
    with pytest.raises(BackendUnavailable, match=r"7\.5.*8\.0.*ort-cuda"):
        backend.create("cuda", device="cuda:0", threads=None, engines=None)
    with pytest.raises(InvalidInput, match="threads"):
        backend.create("cuda", device=None, threads=2, engines=None)
    with pytest.raises(InvalidInput, match="engines"):
        backend.create("cuda", device=None, threads=None, engines=Path("e"))


def test_a_library_that_is_missing_is_named(gpus: list[GpuFacts], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise BackendUnavailable("nvmath-python cannot be imported.", expected="it", fix="Run: pip install x")

    monkeypatch.setattr(backend, "load_cublaslt", missing)
    state = backend.probe("cuda")
    assert (state.available, state.detail) == (False, "nvmath-python cannot be imported")
    assert state.advice == "Run: pip install x"


def test_a_library_that_does_not_open_leaves_nothing_open(machine: CudaMachine) -> None:
    machine.cudnn.error = RuntimeError("CUDNN_STATUS_NOT_INITIALIZED")
    with pytest.raises(BackendUnavailable, match="cuDNN"):
        machine.backend()
    assert machine.cublaslt.alive == {}


def test_maps_without_kernels_are_refused(machine: CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = autoencoder_weights.match

    def match(bundle: Bundle, graph: str, names: Any) -> Any:
        found = real(bundle, graph, names)
        name = next(name for name in found if name.endswith(".gain"))
        return found | {name: replace(found[name], shape=(4, 9))}

    monkeypatch.setattr(autoencoder_weights, "match", match)
    state = backend.ready("cuda", machine.bundle, device=None, engines=None)
    assert not state.available and "36 channels in 4 groups" in state.detail and "ort-cuda" in state.advice


def test_other_types_are_refused(machine: CudaMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel would read a parameter of half precision as float32, past its end."""
    for module, change in ((transformer, "temperature"), (autoencoder_weights, "norm1.gain"), (condition, "offset")):
        real = module.read

        def read(bundle: Bundle, graph: str, stored: Any, real: Any = real, change: str = change) -> Any:
            found = real(bundle, graph, stored)
            for name in found:
                if name.endswith(change):
                    found[name] = Parameter(found[name].value.astype(np.float16), "float16")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(module, "read", read)
            graph = {transformer: "step", autoencoder_weights: "decode", condition: "condition"}[module]
            with pytest.raises(ArtifactRefused, match=rf"{change} is float16 .* not float32"):
                machine.backend().open(machine.bundle, graph)


def test_without_a_gpu_it_says_so() -> None:
    state = backend.probe("cuda")
    if state.available:
        pytest.skip("the test needs a machine without a GPU")
    assert state == probe_gpu()


def test_kernels_that_are_not_of_one_plain_kernel_are_refused() -> None:
    stored = np.random.default_rng(0).standard_normal((2, 2, 8, 4, 2, 2))
    found = {
        f"up.weight_{a}{b}": Parameter(round_to(stored[a, b], "float16"), "float16") for a in (0, 1) for b in (0, 1)
    }
    with pytest.raises(ArtifactRefused, match="not those of one 3x3 kernel"):
        autoencoder_weights._plain_kernel(found, Upsample("up", "phases"))


def test_memory_that_ran_out_is_asked_for_once(machine: CudaMachine) -> None:
    """After a batch that did not fit, a smaller one still runs."""
    with machine.open() as pipeline:
        pipeline([0], SCHEDULE, seed=0)
        assert isinstance(pipeline.backend, Cuda)
        scratch = pipeline.backend.scratch
        scratch.reserve(2**33)
        with pytest.raises(OutOfMemory):
            scratch.take(2**33)
        assert scratch.take(1000).nbytes < 2**20
        pipeline([0, 1], SCHEDULE, seed=0)


def test_bundles_that_it_does_not_run(tiny_bundles: Bundles, schema1_bundle: Path) -> None:
    def ready(path: Path) -> Any:
        return backend.ready("cuda", Bundle.open(path, allow_unproved=True), device=None, engines=None)

    assert ready(tiny_bundles("fp16")).available and ready(tiny_bundles("bf16")).available
    for name in ("fp32", "int8"):
        assert name in ready(tiny_bundles(name)).detail
    assert not ready(schema1_bundle).available


def test_a_byte_that_changes_is_noticed(machine: CudaMachine, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(machine.bundle.path, tmp_path / "copy"))
    opened = Bundle.open(copy)
    with (copy / "step.onnx").open("r+b") as file:
        file.seek(9000)
        byte = file.read(1)
        file.seek(9000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactRefused, match=r"step\.onnx"):
        machine.backend().open(opened, "step")
    with pytest.raises(ArtifactRefused, match=r"step\.onnx"):
        Bundle.open(copy)


def test_convolutions_without_a_plan_are_examined(
    tiny_bundles: Bundles, host_kernels: Callable[..., HostKernels]
) -> None:
    working = make_machine(tiny_bundles("fp16"), host_kernels).backend()
    assert backend.examine_convolutions(working) is None
    replaced = make_machine(tiny_bundles("fp16"), host_kernels, plans=set()).backend()
    note = backend.examine_convolutions(replaced)
    assert note is not None and "no plan for a 3x3 convolution in bfloat16 and float16" in note and "pip" in note


ALONE = """
import sys
from pathlib import Path
for name in ("torch", "triton", "onnx", "onnxruntime", "onnxscript", "openvino"):
    sys.modules[name] = None
bundle, out, *folders = sys.argv[1:]
sys.path[:0] = folders
from cuda_machine import make_machine
from host_kernels import HostKernels

def kernels(wanted, block):
    return HostKernels(wanted, Path(out, str(len(wanted.names))), block=block)

with make_machine(Path(bundle), kernels).open() as pipeline:
    print(pipeline([1], "1_2_3_4", seed=0).images.shape)
print([name for name in ("torch", "triton", "onnx", "onnxruntime") if sys.modules.get(name)])
"""


def test_it_needs_no_torch_triton_onnx_or_onnxruntime(tiny_bundles: Bundles, tmp_path: Path) -> None:
    folders = [Path(__file__).parent, Path(__file__).parents[2] / "cuda"]
    arguments = [sys.executable, "-c", ALONE, tiny_bundles("fp16"), tmp_path, *folders]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 16, 16, 3)\n[]\n"
