"""The options of `flexvar serve` that name sizes, schedules and workers."""

from __future__ import annotations

import pytest

from flexvar_runtime import InvalidInput, ScaleSchedule
from flexvar_runtime.backends import BACKENDS, CPU_BACKENDS
from flexvar_runtime.backends.base import Availability
from flexvar_runtime.errors import EnvironmentFailed
from flexvar_serving import command
from flexvar_serving.command import _batch_sizes, _layout, _schedules
from flexvar_serving.settings import Layout
from flexvar_serving.sizing import candidates


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("1", (1,)), ("1,2,4,8", (1, 2, 4, 8)), (" 8, 1 ,3", (1, 3, 8)), ("1,1024", (1, 1024))],
)
def test_batch_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert _batch_sizes(text) == sizes


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "2,4",
        "0,1",
        "1,1",
        "1,2,2",
        "1,1025",
        "1,-2",
        "1,2.0",
        "1;2",
        "1,,2",
        "1,two",
        "1,²",
        "1," + "9" * 5000,
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_batch_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="--batch-sizes") as refusal:
        _batch_sizes(text)
    assert refusal.value.exit_code == 2 and len(str(refusal.value)) < 300


def test_schedules() -> None:
    assert _schedules(None) is None
    assert _schedules("1_2_4") == (ScaleSchedule.parse("1_2_4"),)
    assert _schedules("1_2_4, 512px,1_2_3x5") == tuple(map(ScaleSchedule.parse, ("1_2_4", "512px", "1_2_3x5")))
    for text in ("", "1_2_4,", "1_2_4;1_2", "2_4", "1_129", "1_2_4,none"):
        with pytest.raises(InvalidInput, match="schedule") as refusal:
            _schedules(text)
        assert refusal.value.exit_code == 2


def without_gpu(name: str) -> Availability:
    return Availability(name in CPU_BACKENDS, "by a test")


def test_what_is_not_named_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "probe", without_gpu)
    assert _layout(None, None, None, "auto") is None
    assert _layout(None, None, "cpu", "auto") is None and _layout(None, None, None, "ort-cpu") is None


def test_nothing_is_measured_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement passes numbers of threads, which GPU backends refuse, and warms all shapes once more."""
    for backend in set(BACKENDS) - CPU_BACKENDS:
        assert _layout(None, None, None, backend) == Layout()
    monkeypatch.setattr(command, "probe", lambda name: Availability(True, "by a test"))
    assert _layout(None, None, None, "auto") == Layout()
    assert _layout(None, None, "cpu", "auto") is None, "a CPU is measured beside a GPU, too"
    assert _layout(2, None, None, "auto") == Layout(devices=(None, None))


@pytest.mark.parametrize(
    ("workers", "threads", "device", "expected"),
    [
        (1, None, None, Layout(threads=8)),
        (3, None, None, Layout(devices=(None, None, None), threads=2)),
        (16, None, None, Layout(devices=(None,) * 16, threads=1)),
        (3, 2, None, Layout(devices=(None, None, None), threads=2)),
        (0, None, None, Layout(threads=8, in_thread=True)),
        (0, 4, None, Layout(threads=4, in_thread=True)),
        (None, 4, None, Layout(devices=(None, None), threads=4)),
        (None, 16, None, Layout(threads=16)),
        (None, None, "cuda:0", Layout(devices=("cuda:0",))),
        (None, None, "cuda:0, cuda:1", Layout(devices=("cuda:0", "cuda:1"))),
        (2, 1, "cpu", Layout(devices=("cpu", "cpu"), threads=1)),  # else a worker might take a GPU
        (None, 4, "cpu", Layout(devices=("cpu", "cpu"), threads=4)),
        (0, None, "cpu", Layout(devices=("cpu",), threads=8, in_thread=True)),
    ],
)
def test_layouts(
    workers: int | None,
    threads: int | None,
    device: str | None,
    expected: Layout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine of 8 processors."""
    monkeypatch.setattr(command, "default_threads", lambda: 8)
    monkeypatch.setattr(command, "probe", without_gpu)
    layout = _layout(workers, threads, device, "auto")
    assert layout == expected and layout.workers == len(expected.devices)


@pytest.mark.parametrize(
    ("workers", "threads", "device", "named"),
    [
        (2, None, "cuda:0", "--device"),
        (None, 4, "cuda:0,cuda:1", "--device"),
        (0, None, "cuda", "--device"),
        (1, 0, None, "--threads"),
        (None, -1, None, "--threads"),
        (2, 0, "cpu", "--threads"),
        (None, None, "", "device"),
        (None, None, "gpu", "device"),
        (None, None, "cuda:0,", "device"),
        (None, None, "cuda:0,cuda:x", "device"),
        (None, None, "cuda:0;cuda:1", "device"),
    ],
)
def test_layouts_that_are_refused(workers: int | None, threads: int | None, device: str | None, named: str) -> None:
    with pytest.raises(InvalidInput, match=named) as refusal:
        _layout(workers, threads, device, "auto")
    assert refusal.value.exit_code == 2


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InvalidInput, match="backend"):
        _layout(None, None, "cuda:0", "torch")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client"])
def test_missing_packages_of_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(EnvironmentFailed, match=missing) as refusal:
        command._require_packages()
    assert "flexvar-deploy[serve]" in refusal.value.fix and refusal.value.exit_code == 4


@pytest.mark.parametrize(
    ("processors", "tried"), [(1, (1,)), (2, (1, 2)), (4, (1, 2, 4)), (16, (1, 4, 16)), (64, (1, 8, 64))]
)
def test_numbers_of_workers_that_are_measured(processors: int, tried: tuple[int, ...]) -> None:
    assert candidates(processors) == tried


def test_no_more_workers_than_processors_are_measured() -> None:
    for processors in range(1, 257):
        tried = candidates(processors)
        assert tried[0] == 1 and tried[-1] == processors and len(tried) <= 3
        assert list(tried) == sorted(set(tried))
