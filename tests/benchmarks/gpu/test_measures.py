"""What is measured on a GPU, rehearsed on a device that computes on the host; and the compiled peer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from fake_ort import OnStream
from fakes import FakeDevice

import flexvar_ref
from flexvar_bench import energy, timing
from flexvar_bench.energy import gpu_counter, joules_of_call
from flexvar_bench.gpu import sampler_checks
from flexvar_bench.gpu.parity import parity
from flexvar_bench.gpu.random_models import random_model, schedule_of
from flexvar_bench.gpu.runtime_jobs import Opened, latency
from flexvar_bench.gpu.torch_compiled import CompiledPeer, Eager, sample_sorted
from flexvar_bench.timing import Budget, memory_watch, repeat, timed_row
from flexvar_export.proof import Proof
from flexvar_ref.sampling import probabilities
from flexvar_runtime import Bundle, FlexVARPipeline, ScaleSchedule
from flexvar_runtime.backends.device_arrays import DeviceArrays
from flexvar_runtime.backends.ort.cuda import OrtCuda
from flexvar_runtime.cuda.kernels import KernelConfig

VOCABULARY = 512


def test_random_models_are_those_of_the_checkpoints(tiny_checkpoint: tuple[Path, Path]) -> None:
    for ours, theirs in zip(random_model("tiny"), flexvar_ref.load(*tiny_checkpoint), strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_kernels_against_the_host(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, schedule = DeviceArrays(device), ScaleSchedule.parse("1_2_3")
    device.load(KernelConfig(VOCABULARY, 8, 64))
    monkeypatch.setattr(sampler_checks, "ROWS", 6)
    found = sampler_checks.draws_equal(arrays, schedule)
    assert found == {"holds": True, "draws": 4 * 4 * 14, "different": 0}
    assert all(row["holds"] for row in sampler_checks.tokens_equal(arrays, VOCABULARY))
    times = sampler_checks.sampling_seconds(arrays, VOCABULARY, ScaleSchedule.parse("1_2"), 2)
    assert [scale["median"] for scale in times] == [0.25 / sampler_checks.LAUNCHES] * 2
    monkeypatch.setattr(sampler_checks, "sample", lambda *a, **k: -sampler_checks.np.ones(6, "int32"))
    assert not any(row["holds"] for row in sampler_checks.tokens_equal(arrays, VOCABULARY))


def test_parity_and_times_on_a_device(
    device: FakeDevice, tiny_bundle: Path, proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, enable_fallback: OnStream(device, path, options, providers),
    )
    with FlexVARPipeline(Bundle.open(tiny_bundle), OrtCuda(device)) as pipeline:
        found = parity(pipeline, proof)
        assert found["passed"] and found["again_equal"] == found["scale_by_scale_equal"] == 1
        tokens = found["teacher_forced_tokens"]
        assert tokens["holds"] and tokens["rows"] == 2 * schedule_of("tiny").tokens
        budget = Budget(warmup=1, least=2, most=2)
        row = latency(Opened(pipeline, "tiny", 0.0), 2, budget, used=lambda: 7)
    assert (row["mode"], row["device_s"]["median"], row["images_per_second_device"]) == (["stream"], 0.25, 8)
    assert (row["samples"], row["warmup"], row["decoder_included"]) == (2, 1, True)
    assert row["device_memory_bytes"] == {"before": 7, "peak": 7, "after": 7}


def test_parity_notices_another_model(tiny_bundle: Path, proof: Proof) -> None:
    case = proof.cases[0]
    wrong = replace(case, logits=tuple(-logits for logits in case.logits))
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipeline:
        found = parity(pipeline, replace(proof, cases=(wrong,)))
    assert not found["passed"]
    assert {row["graph"] for row in found["failed"]} == {"step", "prefill"}


# The compiled peer ----------------------------------------------------------------------------------------------------


def test_the_peer_computes_the_model(proof: Proof) -> None:
    """In float32, uncompiled: what is compiled on a GPU is this."""
    eager = Eager(*random_model("tiny"), schedule_of("tiny"), torch.device("cpu"))
    peer = CompiledPeer(eager, compiler=None)
    assert peer.relative_error(proof.cases[0]) < 1e-5
    peer.prepare([1, 2, 3])
    pixels = peer.run()
    assert pixels.shape == (3, 40, 40, 3) and pixels.dtype == torch.uint8
    assert not torch.equal(pixels, peer.run()), "new draws every time"
    eager.offsets[2] = eager.offsets[2].roll(1, 0)
    assert peer.relative_error(proof.cases[0]) > 1e-3


def test_the_peer_draws_from_the_same_distribution() -> None:
    """Chi-square at four standard deviations, 20,000 draws."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 1, 40)
    expected = probabilities(logits, 20, 0.9)[0, 0]
    draws, kept = 20_000, expected > 0
    tokens = sample_sorted(logits.expand(1, draws, 40), 20, 0.9)
    counts = torch.bincount(tokens.flatten(), minlength=40).double()
    assert counts[~kept].sum() == 0
    chi2 = ((counts - draws * expected)[kept] ** 2 / (draws * expected)[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


# Timing ---------------------------------------------------------------------------------------------------------------


def test_repetition_keeps_to_its_budget() -> None:
    calls: list[int] = []

    def work() -> float:
        calls.append(1)
        return 0.5

    times = repeat(work, Budget(warmup=2, least=3, most=7, seconds=0.0))
    assert (len(calls), len(times.walls), times.devices) == (5, 3, [0.5] * 3), "at least so many"
    times = repeat(work, Budget(warmup=0, least=1, most=7, seconds=60))
    assert len(times.walls) == 7 and times.joules is None, "at most so many"


@pytest.fixture
def clock(clock_of: Any) -> Any:
    return clock_of(energy, timing)


@pytest.fixture
def nvml(clock: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver of one GPU that takes 300 watts."""
    fake = SimpleNamespace(
        init_v2=lambda: None,
        device_get_count_v2=lambda: 1,
        device_get_handle_by_index_v2=lambda index: 100 + index,
        device_get_total_energy_consumption=lambda gpu: 3e5 * clock.now if gpu == 100 else None,
    )
    monkeypatch.setattr("cuda.bindings.nvml", fake, raising=False)
    return fake


def test_energy_is_that_of_the_counted_calls(nvml: Any, clock: Any) -> None:
    budget = Budget(warmup=3, least=4, most=4, seconds=0)
    row = timed_row(2, repeat(lambda: clock.sleep(1), budget, gpu_counter()), budget)
    assert row["joules_per_image"] == pytest.approx(300 / 2)
    assert repeat(lambda: clock.sleep(0.01), budget, gpu_counter()).joules is None, "too short for the counter"
    assert timed_row(2, repeat(lambda: clock.sleep(1), budget), budget)["joules_per_image"] is None


def test_the_energy_of_a_call(nvml: Any, clock: Any) -> None:
    counter = gpu_counter()
    assert counter is not None
    assert joules_of_call(lambda: clock.sleep(0.02), counter) == pytest.approx(300 * 0.02)


@pytest.mark.parametrize("count", [0, 2])
def test_no_counter_where_it_could_be_another_gpus(nvml: Any, count: int) -> None:
    nvml.device_get_count_v2 = lambda: count
    assert gpu_counter() is None


def test_no_counter_without_a_driver_or_on_a_card_that_does_not_count(nvml: Any) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Not Supported")

    nvml.device_get_total_energy_consumption = refuse
    assert gpu_counter() is None
    nvml.init_v2 = refuse
    assert gpu_counter() is None


def test_the_height_of_memory_is_seen() -> None:
    used = [1]
    with memory_watch(lambda: used[0]) as memory:
        used[0] = 9
        while memory["peak"] < 9:
            pass
        used[0] = 2
    assert memory == {"before": 1, "peak": 9, "after": 2}
    with memory_watch(None) as memory:
        pass
    assert memory == {}
