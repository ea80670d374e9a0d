"""The memory plan against the peak of a real process: never below it, and at most a quarter above it.

A plan that is too low lets requests through that the system kills. One that is too high refuses requests that fit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from flexvar_runtime import Bundle, ScaleSchedule
from flexvar_runtime.backends import libraries
from flexvar_runtime.backends.openvino.backend import has_bf16_arithmetic
from flexvar_runtime.memory.plan import PUBLISHED_DECODER, MemoryPlan, plan

SIX = "1_2_4_6_10_16"
TEN = "1_2_3_4_5_6_8_10_13_16"
THIRTEEN = "1_2_3_4_5_6_7_8_9_10_12_14_16"
TINY_DECODER = (32, 64)
ABOVE = 0.25

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc/self/status")

# Not ru_maxrss, which includes the size of the parent process. With ONNX Runtime, graphs are opened before the
# measurement: repacking weights counts pages of the files that the system can take back at any time.
GENERATE = """
import sys
from pathlib import Path
from flexvar_runtime import FlexVARPipeline, Guidance

bundle, schedule, images, guidance, times, backend = sys.argv[1:]
with FlexVARPipeline.from_bundle(bundle, backend=backend, threads=2) as pipe:
    if backend == "ort-cpu":
        for graph in ("step", "decode"):
            pipe.generator.graph(graph)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for i in range(int(times)):
        labels = [(i * int(images) + k) % 10 for k in range(int(images))]
        pipe(labels, schedule, Guidance(float(guidance)), seed=0)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


@cache
def peak(bundle: Path, schedule: str, images: int, guided: bool, times: int = 1, backend: str = "ort-cpu") -> int:
    """Peak resident memory of a fresh process that generates `times` batches, each with different classes."""
    options = (str(bundle), schedule, str(images), "2.5" if guided else "0", str(times), backend)
    done = subprocess.run([sys.executable, "-c", GENERATE, *options], check=True, capture_output=True, text=True)
    return int(done.stdout)


def planned(
    bundle: Path,
    schedule: str,
    images: int,
    guided: bool,
    channels: tuple[int, int],
    backend: str = "ort-cpu",
) -> MemoryPlan:
    manifest = Bundle.open(bundle).manifest
    return plan(
        manifest,
        ScaleSchedule.parse(schedule),
        images,
        guided,
        libraries(backend, manifest.precision),
        decoder_channels=channels,
    )


def assert_close_above(estimate: int, measured: int) -> None:
    over = estimate / measured - 1
    assert 0 <= over <= ABOVE, f"plan {estimate / 2**20:.0f} MiB, peak {measured / 2**20:.0f} MiB: {over:+.1%}"


@pytest.mark.parametrize(
    ("precision", "schedule", "images", "guided"),
    [
        ("fp32", TEN, 1, True),
        ("fp32", SIX, 8, False),
        ("fp32", TEN, 16, True),
        ("fp32", "1_2_3x5_12x20", 4, True),
        ("fp32", "512px", 1, True),
        ("fp16", TEN, 1, False),
        ("fp16", THIRTEEN, 8, True),
        ("int8", TEN, 1, True),
        ("int8", TEN, 16, True),
    ],
)
def test_tiny(tiny_bundles: Callable[[str], Path], precision: str, schedule: str, images: int, guided: bool) -> None:
    bundle = tiny_bundles(precision)
    request = (bundle, schedule, images, guided)
    assert_close_above(planned(*request, TINY_DECODER).total, peak(*request))


@pytest.mark.parametrize(
    ("precision", "schedule", "images", "guided"),
    [("fp32", TEN, 1, True), ("fp32", TEN, 16, True), ("fp32", "512px", 1, True), ("fp16", THIRTEEN, 8, True)],
)
def test_tiny_with_openvino(
    tiny_bundles: Callable[[str], Path], precision: str, schedule: str, images: int, guided: bool
) -> None:
    request = (tiny_bundles(precision), schedule, images, guided)
    assert_close_above(planned(*request, TINY_DECODER, "openvino").total, peak(*request, backend="openvino"))


@pytest.mark.parametrize(
    ("precision", "backend", "schedule", "images"),
    [
        ("bf16", "openvino", TEN, 1),
        ("bf16", "openvino", TEN, 16),
        ("int8-bf16", "ort-openvino", TEN, 1),
        ("int8-bf16", "ort-openvino", TEN, 16),
        ("int8-bf16", "ort-openvino", "512px", 1),
    ],
)
def test_tiny_with_a_tokenizer_in_bf16(
    tiny_bundles: Callable[[str], Path], precision: str, backend: str, schedule: str, images: int
) -> None:
    if not has_bf16_arithmetic():
        pytest.skip("this processor has no bfloat16 arithmetic, for which the plan was measured")
    request = (tiny_bundles(precision), schedule, images, True)
    assert_close_above(planned(*request, TINY_DECODER, backend).total, peak(*request, backend=backend))


def test_generations_after_the_first(tiny_bundle: Path) -> None:
    """With other classes, the condition graph is opened again while the others are open, and the decoder runs again."""
    request = (tiny_bundle, TEN, 8, True)
    assert_close_above(max(planned(*request, TINY_DECODER).phases.values()), peak(*request, times=3))


def test_the_bound_fails_without_a_part(tiny_bundle: Path) -> None:
    request = (tiny_bundle, TEN, 16, True)
    complete, measured = planned(*request, TINY_DECODER), peak(*request)
    for part in ("runtime", "kv"):
        with pytest.raises(AssertionError, match=r"plan .* MiB, peak .* MiB: -"):
            assert_close_above(replace(complete, **{part: 0}).total, measured)
    with pytest.raises(AssertionError, match=r"plan .* MiB, peak .* MiB: \+"):  # guided twice
        assert_close_above(planned(tiny_bundle, TEN, 32, True, TINY_DECODER).total, measured)


@pytest.fixture(scope="module")
def d16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flexvar_bench.against_reference import checkpoints, exported

    work = tmp_path_factory.mktemp("d16")
    return exported(work, 16, checkpoints(work, 16))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("schedule", "images", "guided"),
    [(SIX, 1, True), (TEN, 1, True), (TEN, 1, False), (THIRTEEN, 1, True), (TEN, 4, True), ("512px", 1, True)],
)
def test_d16(d16: Path, schedule: str, images: int, guided: bool) -> None:
    request = (d16, schedule, images, guided)
    assert_close_above(planned(*request, PUBLISHED_DECODER).total, peak(*request))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("schedule", "images"), [(SIX, 1), (TEN, 1), (TEN, 4)])
def test_d16_with_openvino(d16: Path, schedule: str, images: int) -> None:
    request = (d16, schedule, images, True)
    assert_close_above(planned(*request, PUBLISHED_DECODER, "openvino").total, peak(*request, backend="openvino"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_d16_generations_after_the_first(d16: Path) -> None:
    request = (d16, TEN, 1, True)
    assert_close_above(max(planned(*request, PUBLISHED_DECODER).phases.values()), peak(*request, times=3))
