"""The configuration and the compilation of the layers' kernels, and arrays that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from layer_numbers import HALVES

from flexvar_runtime.cuda import layers
from flexvar_runtime.cuda.array import DeviceArray
from flexvar_runtime.cuda.compilation import compile_source
from flexvar_runtime.cuda.layers import Branch, LayerConfig
from flexvar_runtime.errors import BackendUnavailable


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def compiled(config: LayerConfig, target: str) -> dict[str, tuple[int, int, int]]:
    """Kernel to its registers, its bytes of shared memory and its bytes of spills, from NVRTC's log."""
    pytest.importorskip("cuda.core", reason="needs cuda.core and NVRTC, no GPU: pip install 'flexvar-deploy[gpu]'")
    cubin, text = compile_source(config.source, target, config)
    assert cubin.startswith(b"\x7fELF") and "warning" not in text.lower()
    found = {}
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        registers, shared, spills = (_number(pattern, part) for pattern in REPORTED)
        name = re.search(r"'(\w+)'", part)
        assert name is not None
        found[name[1]] = registers, shared, spills
    return found


REPORTED = r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores"
TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"]


@pytest.mark.parametrize(
    ("target", "half"),
    [
        *((target, "float16") for target in TARGETS),
        ("sm_90", "bfloat16"),
        *(pytest.param(target, "bfloat16", marks=pytest.mark.kernels) for target in TARGETS if target != "sm_90"),
    ],
)
def test_every_kernel_compiles(target: str, half: str) -> None:
    """No kernel spills or has more shared memory than a block may have without asking."""
    for width, heads in ((1024, 16), (1536, 24)) if target == "sm_90" else ((1024, 16),):
        found = compiled(LayerConfig(half, width, heads, 32), target)
        assert set(found) == set(LayerConfig.names)
        for name, (registers, shared, spills) in found.items():
            assert spills == 0 and shared <= 48 * 1024 and registers <= (168 if name == "attention" else 80), name


@pytest.mark.kernels
@pytest.mark.parametrize(("width", "heads"), [(128, 8), (192, 6), (1280, 20), (2048, 16), (4096, 64)])
def test_kernels_of_other_sizes_compile(width: int, heads: int) -> None:
    for half in HALVES:
        found = compiled(LayerConfig(half, width, heads, 8), "sm_90")
        assert all(spills == 0 and shared <= 48 * 1024 for _, shared, spills in found.values())


# --- refusals


def test_sizes_without_kernels_are_refused() -> None:
    for arguments, needed in (
        ((96, 2, 8), "heads of size 16, 32, 64, 128, and this model has heads of size 48"),
        ((128, 2, 12), "codes of 8 to 256 numbers"),
        ((120, 7, 8), "heads of size 17"),
        ((32768, 512, 8), "a width of at most 16384"),
    ):
        with pytest.raises(BackendUnavailable, match=needed):
            LayerConfig("float16", *arguments)
    with pytest.raises(ValueError, match="not in float32"):
        LayerConfig("float32", 128, 2, 8)


def test_arrays_that_do_not_fit_are_refused() -> None:
    def array(*shape: int, dtype: str = "float16") -> DeviceArray:
        return DeviceArray(4096, shape, dtype, None)

    def wide(*shape: int) -> DeviceArray:
        return array(*shape, dtype="float32")

    branch = Branch(array(2, 3, 8), wide(2, 1, 8))
    rows = array(2, dtype="int32"), array(2, dtype="int32")
    calls: list[Callable[[], object]] = [
        lambda: layers.embed(wide(3, 8), wide(8, 16), wide(3, 16), wide(4, 16)),
        lambda: layers.modulate_rows(wide(2, 3, 8), None, wide(2, 1, 8), wide(3, 1, 8), array(2, 3, 8)),
        lambda: layers.modulate_rows(wide(2, 4, 8), branch, wide(2, 1, 8), wide(2, 1, 8), array(2, 4, 8)),
        lambda: layers.guide_rows(wide(2, 3, 8), branch, wide(2, 1, 8), wide(2, 1, 8), rows, wide(3), array(3, 3, 8)),
        lambda: layers.split_heads(array(1, 2, 24), wide(1), wide(1, 2, 8), array(2, 1, 1, 8), array(2, 1, 1, 8)),
        lambda: layers.split_heads(array(1, 2, 24), wide(1), array(1, 2, 8), array(1, 2, 1, 8), array(1, 2, 1, 8)),
        lambda: layers.class_rows(rows[0], wide(5, 8), wide(8), wide(8), array(3, 8), wide(3, 1, 8)),
        lambda: layers.look_up(rows[0], array(5, 8), array(2, 9)),
        lambda: layers.group_statistics(array(1, 4, 4, 8), wide(9), rows[0], wide(1, 8, 2)),
        lambda: layers.group_normalise(
            array(1, 4, 4, 8), wide(1, 3, 2), wide(8), wide(8), array(1, 4, 4, 8), silu=True
        ),
        lambda: layers.double_map(array(1, 4, 4, 8), array(1, 8, 4, 8)),
        lambda: layers.softmax_rows(wide(4, 8), array(4, 8), 9),
        lambda: layers.im2col(array(1, 4, 4, 8), array(15, 72), kernel=(3, 3), out_size=(4, 4)),
        lambda: layers.to_planes(array(1, 4, 4, 8), wide(1, 9, 4, 4)),
        lambda: layers.add_maps(array(1, 4, 4, 8), wide(1, 4, 4, 8), array(1, 4, 4, 8)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit"):
            call()
