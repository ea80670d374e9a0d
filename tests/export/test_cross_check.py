"""Two backends compared: all outputs are compared, and a difference is found in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexvar_export.cross_check import cross_check
from flexvar_export.parity import GATES, PSNR_CAP
from flexvar_export.proof import PROOF_FILE, Proof
from flexvar_runtime import BackendUnavailable, Bundle, InvalidInput, backends
from flexvar_runtime.backends.ort.cpu import OrtCpu
from flexvar_runtime.backends.ort.session import OrtGraph


class Other(OrtCpu):
    """A second backend, which changes one output of one graph."""

    name = "other"

    def __init__(self, graph: str = "", output: str = "", factor: float = 1.01) -> None:
        super().__init__(1)
        self._spoiled, self._factor = (graph, output), factor

    def open(self, bundle: Bundle, graph: str, *, once: bool = False) -> OrtGraph:
        opened = super().open(bundle, graph)
        run = opened.run

        def spoiled(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
            run(inputs, outputs)
            if graph == self._spoiled[0]:
                outputs[self._spoiled[1]][:] *= np.float32(self._factor)

        opened.run = spoiled  # type: ignore[method-assign]
        return opened


def check(path: Path, *spoiled: Any) -> Any:
    bundle = Bundle.open(path)
    return cross_check(bundle, Proof.load(bundle.file(PROOF_FILE)), OrtCpu(1), Other(*spoiled))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_backend_agrees_with_itself(tiny_bundles: Callable[[str], Path], precision: str) -> None:
    record = check(tiny_bundles(precision))
    assert record.passed and record.backend == "other against ort-cpu"
    assert {row.graph for row in record.rows} == {"condition", "step", "decode", "encode"}
    assert {row.output for row in record.rows} >= {"modulation", "logits", "new_k_0", "new_v_1", "image", "latent"}
    assert len({row.scale for row in record.rows if row.graph == "step"}) == 10
    assert all(row.value < 1e-6 for row in record.rows if row.metric == "relative_error")
    [decoded] = [row for row in record.rows if row.graph == "decode"]
    if precision == "fp16":
        assert (decoded.metric, decoded.bound, decoded.value) == ("psnr_db", GATES["fp16"].psnr - 6, PSNR_CAP)
    else:
        assert (decoded.metric, decoded.bound) == ("relative_error", 2 * GATES["fp32"].relative)


@pytest.mark.parametrize(
    ("graph", "output", "row"),
    [
        ("condition", "head_shift", "head_modulation"),
        ("condition", "gamma2_1", "modulation"),
        ("step", "new_v_1", "new_v_1"),
        ("decode", "image", "image"),
        ("encode", "latent", "latent"),
    ],
)
def test_a_difference_is_found_in_its_output(tiny_bundle: Path, graph: str, output: str, row: str) -> None:
    record = check(tiny_bundle, graph, output)
    assert not record.passed
    assert {(found.graph, found.output) for found in record.rows if not found.holds} == {(graph, row)}


def test_the_bound_of_images_is_twice_that_of_the_proof(tiny_bundles: Callable[[str], Path]) -> None:
    """By PSNR in half precision. The bound in float32 is stricter."""
    half, full = (check(tiny_bundles(name), "decode", "image", 1.005) for name in ("fp16", "fp32"))
    [decoded] = [row for row in half.rows if row.graph == "decode"]
    assert half.passed and GATES["fp16"].psnr - 6 < decoded.value < 70
    assert [row.graph for row in full.rows if not row.holds] == ["decode"]
    assert not check(tiny_bundles("fp32"), "decode", "image", 1.0001).passed
    assert not check(tiny_bundles("fp16"), "decode", "image", 1.05).passed


def test_bundles_that_cannot_be_compared(tiny_bundles: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"--against .*bf16"):
        check(tiny_bundles("bf16"))
    monkeypatch.setitem(__import__("sys").modules, "polygraphy.comparator", None)
    with pytest.raises(BackendUnavailable, match=r"polygraphy.* pip install"):
        check(tiny_bundles("fp32"))


def test_the_command(
    tiny_bundle: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run_cli("verify", tiny_bundle, "--backend", "ort-cpu", "--against", "ort-cpu", "--threads", "1")
    assert code == 0 and "parity on ort-cpu against ort-cpu" in out
    asked: list[tuple[str, int | None]] = []

    def create(name: str, bundle: Bundle, *, threads: int | None = None, **options: object) -> OrtCpu:
        asked.append((name, threads))
        return OrtCpu(1)

    monkeypatch.setattr(backends, "create", create)
    for name in ("ort-cpu", "ort-cuda"):  # a GPU takes no threads
        assert run_cli("verify", tiny_bundle, "--backend", name, "--against", "ort-cpu", "--threads", "3")[0] == 0
    assert asked == [("ort-cpu", 3), ("ort-cpu", 3), ("ort-cpu", 3), ("ort-cuda", None)]
    code, _, err = run_cli("verify", tiny_bundle, "--against", "ort-cpu", "--checkpoint", "a", "--vae", "b")
    assert code == 2 and "--against" in err and "--checkpoint" in err
