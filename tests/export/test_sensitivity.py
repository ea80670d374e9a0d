"""Parts kept in float32: measured where a bundle fails its gate, and as few as make it pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexvar_ref
from flexvar_export.bundle import export_bundle
from flexvar_export.modules import Step, block_parts
from flexvar_export.parity import GATES
from flexvar_export.proof import Proof, make_proof
from flexvar_export.sensitivity import HEADROOM, MOST_KEPT, parts_to_keep, rounding_errors, step_excess
from flexvar_export.teacher_forcing import teacher_forced
from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime import Bundle, Guidance, InvalidInput, ParityFailed, ScaleSchedule
from flexvar_runtime.bundle.manifest import ParityRecord, ParityRow

Pair = tuple[FlexVAR, Tokenizer]
SENSITIVE = "blocks.0.mlp"
PARTS = ("blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp")


@pytest.fixture(scope="module")
def sensitive(tiny_pair: Pair) -> FlexVAR:
    """A model that is sensitive to rounding in its first MLP.

    The results of this MLP are 40 times larger, and the two branches of guidance are almost equal.
    """
    model = copy.deepcopy(tiny_pair[0])
    with torch.no_grad():
        model.class_emb.weight.mul_(0.01)
        model.blocks[0].ffn.fc2.weight.mul_(40)
    return model


@pytest.fixture
def sensitive_checkpoint(sensitive: FlexVAR, tiny_checkpoint: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "sensitive.safetensors"
    flexvar_ref.save(sensitive, path)
    return path, tiny_checkpoint[1]


def test_names_of_the_parts() -> None:
    assert block_parts(2) == PARTS


# Measuring


def test_teacher_forcing_in_float32_equals_the_reference(tiny_pair: Pair, tiny_bundle: Path) -> None:
    model = tiny_pair[0]
    for case in Proof.load(tiny_bundle / "proof.npz").cases:
        step = Step(model, torch.float32).eval()
        for logits, rows, expected in zip(teacher_forced(step, model, case), case.rows, case.logits, strict=True):
            assert torch.allclose(logits[:, rows], torch.from_numpy(expected), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_most_sensitive_part_is_found(sensitive: FlexVAR, tiny_pair: Pair, dtype: torch.dtype) -> None:
    model, tokenizer = sensitive, tiny_pair[1]
    proof = make_proof(model, tokenizer, ScaleSchedule.parse("1_2_3"), Guidance(2.5))
    errors = rounding_errors(model, proof, dtype)
    assert set(errors) == set(PARTS)
    assert all(errors[SENSITIVE] > 3 * error > 0 for part, error in errors.items() if part != SENSITIVE)


@torch.inference_mode()
def test_kept_parts_compute_in_float32(sensitive: FlexVAR) -> None:
    """Keys and values are cached in half precision in any case."""
    step = Step(sensitive, torch.bfloat16, ["blocks.0.attention", "blocks.1.mlp"])
    first, second = step.blocks
    for block, attention, mlp in ((first, torch.float32, torch.bfloat16), (second, torch.bfloat16, torch.float32)):
        assert {block.q.weight.dtype, block.k.bias.dtype, block.v.weight.dtype, block.proj.weight.dtype} == {attention}
        assert {block.fc1.weight.dtype, block.fc1.bias.dtype, block.fc2.weight.dtype} == {mlp}
        x = torch.randn(2, 3, sensitive.config.width)
        past = torch.zeros(4, 2, sensitive.config.heads, 64, dtype=torch.bfloat16)
        result, keys, values = block(x, list(torch.randn(6, 2, 1, sensitive.config.width)), (past, past))
        assert (result.dtype, keys.dtype, values.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


# Choosing


@given(st.dictionaries(st.sampled_from(block_parts(8)), st.floats(1e-6, 1.0), min_size=2), st.floats(1.0, 10.0))
def test_the_fewest_parts_that_should_meet_the_gate(errors: dict[str, float], excess: float) -> None:
    sets = list(parts_to_keep(errors, excess))
    total = sum(error**2 for error in errors.values())

    def left(kept: tuple[str, ...]) -> float:
        return excess * (sum(errors[part] ** 2 for part in errors if part not in kept) / total) ** 0.5

    assert all(len(kept) <= MOST_KEPT * len(errors) and left(kept) <= HEADROOM * (1 + 1e-9) for kept in sets)
    for smaller, larger in pairwise(sets):
        assert set(smaller) < set(larger) and len(larger) == len(smaller) + 1
    if sets:
        worst = sorted(errors.values())[-len(sets[0]) :]
        assert sorted(errors[part] for part in sets[0]) == worst
        fewer = sorted(errors, key=lambda part: -errors[part])[: len(sets[0]) - 1]
        assert not fewer or left(tuple(fewer)) > HEADROOM * (1 - 1e-9)


def row(graph: str, value: float, metric: str = "relative_error", bound: float = 0.01) -> ParityRow:
    return ParityRow(graph=graph, scale=None, output="logits", metric=metric, value=value, bound=bound)


@pytest.mark.parametrize(
    ("rows", "excess"),
    [
        ((row("step", 0.009),), 0.0),
        ((row("step", 0.02), row("prefill", 0.03), row("decode", 60, "psnr_db", 40)), 3.0),
        ((row("step", 0.02), row("condition", 0.02)), 0.0),
        ((row("step", 0.02), row("decode", 30, "psnr_db", 40)), 0.0),
    ],
)
def test_excess_is_that_of_step_and_prefill_alone(rows: tuple[ParityRow, ...], excess: float) -> None:
    record = ParityRecord(
        backend="ort-cpu", emulated=False, passed=all(row.holds for row in rows), rows=rows, free_running_agreement=None
    )
    assert step_excess(record) == pytest.approx(excess)


# Exporting


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "rounded"), [("bf16", onnx.TensorProto.BFLOAT16), ("int8", onnx.TensorProto.INT8)]
)
def test_export_keeps_the_parts_that_the_gate_requires(
    sensitive_checkpoint: tuple[Path, Path],
    cached_exports: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    rounded: int,
) -> None:
    """The manifest lists the parts, and the graphs hold them in float32. Without them the gate fails."""
    monkeypatch.setitem(GATES, "int8", replace(GATES["int8"], logits=2e-2))  # this model has 0.044
    said: list[str] = []
    bundle = export_bundle(*sensitive_checkpoint, tmp_path / "auto", precision=precision, progress=said.append)
    assert bundle.manifest.float32_parts == (SENSITIVE,)
    assert bundle.manifest.parity.passed and said[-2:] == [
        "finding the parts that must stay float32",
        f"keeping {SENSITIVE} in float32",
    ]
    for graph in ("step", "prefill"):
        model = onnx.load(str(bundle.graph_file(graph)))
        types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        assert {
            name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT and name.startswith("blocks.")
        } >= {"blocks.0.fc1.weight", "blocks.0.fc2.weight"}
        assert types["blocks.0.proj.weight"] == rounded
    with pytest.raises(ParityFailed):  # an explicit list is not extended
        export_bundle(*sensitive_checkpoint, tmp_path / "none", precision=precision, float32_parts=())
    assert not (tmp_path / "none").exists()


def test_bundles_that_pass_keep_no_parts(tiny_bundles: Callable[[str], Path]) -> None:
    for precision in ("fp16", "bf16", "int8"):
        assert Bundle.open(tiny_bundles(precision)).manifest.float32_parts == ()


@pytest.mark.slow
def test_parts_by_name(
    tiny_checkpoint: tuple[Path, Path],
    quick_export: None,
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    transformer, vae = tiny_checkpoint
    call = ("export", transformer, "--vae", vae, "-o", tmp_path / "named", "--precision", "fp16", "--json")
    code, text, _ = run_cli(*call, "--float32", "blocks.0.mlp,blocks.0.attention")
    assert code == 0 and json.loads(text)["float32_parts"] == ["blocks.0.attention", "blocks.0.mlp"]
    code, _, errors = run_cli(*call, "--force", "--float32", "blocks.2.mlp")
    assert code == 2 and "--float32" in errors and "'blocks.2.mlp'" in errors


def test_parts_of_a_float32_bundle_are_refused(tiny_checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"--float32 .*--precision fp32"):
        export_bundle(*tiny_checkpoint, tmp_path / "bundle", float32_parts=["blocks.0.mlp"])
