"""The recorded proof: outputs of the reference, complete or thinned. Other files under its name are refused."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexvar_export.proof import PROOF_FILE, ROWS_KEPT, SEED, Proof, make_proof, reference_options, shared_noise
from flexvar_ref import FlexVAR, Tokenizer, generate
from flexvar_runtime import ArtifactRefused, Bundle, Guidance, Sampling, ScaleSchedule
from flexvar_runtime.model.noise import uniforms

Pair = tuple[FlexVAR, Tokenizer]
SCHEDULE = ScaleSchedule.parse("1_2_5")


@pytest.fixture(scope="module")
def proof(tiny_pair: Pair) -> Proof:
    return make_proof(*tiny_pair, SCHEDULE, Guidance(2.5, "ramp"))


def assert_same(a: object, b: object) -> None:
    """Assert that two values are equal: dataclasses by field, arrays by type and content."""
    assert type(a) is type(b)
    if is_dataclass(a):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple) and isinstance(b, tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    else:
        assert a == b


def test_a_proof_holds_the_outputs_of_the_reference(proof: Proof, tiny_pair: Pair) -> None:
    model, tokenizer = tiny_pair
    case, other = proof.cases
    assert (case.labels, case.schedule, case.guidance) == ((3, 9), SCHEDULE, Guidance(2.5, "ramp"))
    assert len(other.labels) == 1 and other.guidance.rule == "constant"  # the other rule, and not square
    assert any(h != w for h, w in other.schedule)
    assert proof.labels == (3, 9, 10)  # "no class" among them

    options = reference_options(case.guidance, Sampling(max_side=case.guidance.max_side))
    tokens, image = generate(model, tokenizer, case.labels, SCHEDULE, options, shared_noise(SEED))
    for recorded, expected in zip(case.tokens, tokens, strict=True):
        assert np.array_equal(recorded, expected)
    assert np.array_equal(case.decoded, image)
    with torch.inference_mode():
        assert np.array_equal(proof.first_input, model.first_input(torch.tensor(proof.labels)))
        assert np.array_equal(proof.latent, tokenizer.encode(torch.from_numpy(proof.image)))
    assert proof.image.min() >= -1 and proof.image.max() <= 1 and proof.image.std() > 0.2


def test_draws_are_those_of_the_runtime() -> None:
    noise = shared_noise(7, first_index=3)(2, 6, 4)  # scale 2, 6 positions, images 3 … 6
    assert noise.shape == (4, 6)
    for i in range(4):
        assert np.array_equal(noise[i], uniforms(7, 3 + i, 2, 6))


@pytest.mark.parametrize("greedy", ["upstream", "none"])
def test_options_are_those_of_the_runtime(greedy: str) -> None:
    options = reference_options(Guidance(3.0, "constant", 8), Sampling(12, 0.5, greedy, 8))
    assert (options.cfg, options.rule, options.max_side) == (3.0, "constant", 8)
    assert (options.top_k, options.top_p, options.upstream_greedy) == (12, 0.5, greedy == "upstream")


def test_a_saved_proof_is_loaded_unchanged(proof: Proof, tmp_path: Path) -> None:
    for one in (proof, proof.thinned(), proof.thinned(1)):
        one.save(tmp_path / PROOF_FILE)
        assert_same(Proof.load(tmp_path / PROOF_FILE), one)


def test_the_same_proof_gives_the_same_bytes(proof: Proof, tiny_pair: Pair, tmp_path: Path) -> None:
    proof.save(tmp_path / "a.npz")
    make_proof(*tiny_pair, SCHEDULE, Guidance(2.5, "ramp")).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # no clock was read


def test_thinning_keeps_rows_spread_evenly(proof: Proof) -> None:
    for case, thin in zip(proof.cases, proof.thinned(7).cases, strict=True):
        for (h, w), rows, logits, every in zip(case.schedule, thin.rows, thin.logits, case.logits, strict=True):
            assert len(rows) == min(7, h * w)
            assert rows[0] == 0 and rows[-1] == h * w - 1  # corners included, none twice
            assert np.all(np.diff(rows) >= 1) and np.ptp(np.diff(rows)) <= 1 if len(rows) > 1 else True
            assert np.array_equal(logits, every[:, rows])
        assert_same(replace(thin, rows=case.rows, logits=case.logits), case)  # nothing else is left out


def test_the_proof_in_a_bundle_is_thinned(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    travelling = Proof.load(bundle.file(PROOF_FILE))
    travelling.require_fit(bundle.manifest.model)
    for case in travelling.cases:
        assert [len(rows) for rows in case.rows] == [min(ROWS_KEPT, h * w) for h, w in case.schedule]


# Refusals


def spoiled(kind: str, whole: bytes, path: Path) -> None:
    if kind == "nothing":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("a proof")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"labels": [1]}))
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "objects":
        np.savez(path, labels=np.array([print], dtype=object))


@pytest.mark.parametrize("kind", ["nothing", "cut", "text", "pickle", "one array", "objects", "missing"])
def test_another_file_is_refused(proof: Proof, tmp_path: Path, kind: str) -> None:
    path = tmp_path / PROOF_FILE
    if kind != "missing":
        proof.save(path)
        spoiled(kind, path.read_bytes(), path)
    with pytest.raises(ArtifactRefused, match=r"proof\.npz"):
        Proof.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", None),
        ("case0.tokens2", None),
        ("latent", None),
        ("case0.schedule", np.array([[2, 2], [3, 3], [5, 5]])),
        ("case0.schedule", np.array([1, 2, 3])),
        ("case0.guidance_scale", np.array(np.nan)),
        ("case1.max_side", np.array(0)),
    ],
)
def test_an_array_that_is_missing_or_impossible_is_refused(
    proof: Proof, tmp_path: Path, name: str, value: np.ndarray | None
) -> None:
    path = tmp_path / PROOF_FILE
    proof.save(path)
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays.pop(name) if value is None else arrays.update({name: value})
    np.savez(path, **arrays)
    with pytest.raises(ArtifactRefused, match=r"proof\.npz"):
        Proof.load(path)


def test_tables_are_no_proof(tiny_bundle: Path) -> None:
    with pytest.raises(ArtifactRefused, match=r"tables\.npz"):
        Proof.load(tiny_bundle / "tables.npz")


@pytest.mark.parametrize("change", [{"depth": 3}, {"vocabulary": 511}, {"code_dim": 4}, {"downsampling": 8}])
def test_a_proof_of_another_model_does_not_fit(tiny_bundle: Path, tiny_proof: Proof, change: dict[str, Any]) -> None:
    model = replace(Bundle.open(tiny_bundle).manifest.model, **change)
    with pytest.raises(ArtifactRefused, match=r"shape \(.*shape \("):
        tiny_proof.require_fit(model)


def test_a_proof_without_cases_is_refused(tiny_bundle: Path, tiny_proof: Proof) -> None:
    with pytest.raises(ArtifactRefused, match="no case"):
        replace(tiny_proof, cases=()).require_fit(Bundle.open(tiny_bundle).manifest.model)
