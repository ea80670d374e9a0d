"""The proof: recorded inputs and outputs of the reference, with which every backend is compared.

The reference computes it in float32. The bundle holds it with a few rows of logits per scale, so that the bundle can be
verified again without its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from flexvar_ref import FlexVAR, Options, Tokenizer, iter_scales
from flexvar_ref.generation import Uniforms
from flexvar_runtime import Guidance, Sampling, ScaleSchedule
from flexvar_runtime.errors import ArtifactRefused
from flexvar_runtime.files.npz import open_npz
from flexvar_runtime.files.parsing import refuse_failures
from flexvar_runtime.model.facts import ModelFacts
from flexvar_runtime.model.noise import uniforms

PROOF_FILE = "proof.npz"
ROWS_KEPT = 12  # positions of each scale whose logits the bundle holds
SEED = 20260101

Float32 = NDArray[np.float32]
_ARRAYS = ("modulation", "head_modulation", "first_input", "image", "latent")
_EXPORT_AGAIN = "Export the bundle again."
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One generation of the reference.

    tokens: (B, h, w) of every scale, the inputs of the next. rows: positions of every scale whose logits are recorded.
    logits: guided logits (B, rows, V) of every scale. decoded: image (B, 3, H, W) of the last tokens.
    """

    labels: tuple[int, ...]
    schedule: ScaleSchedule
    guidance: Guidance
    tokens: tuple[NDArray[np.int32], ...]
    rows: tuple[NDArray[np.int32], ...]
    logits: tuple[Float32, ...]
    decoded: Float32


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Generations, the condition of some labels (M), and an image (1, 3, H, W) with its latent (1, D, h, w)."""

    cases: tuple[Case, ...]
    labels: tuple[int, ...]
    modulation: Float32
    head_modulation: Float32
    first_input: Float32
    image: Float32
    latent: Float32

    def thinned(self, rows: int = ROWS_KEPT) -> Proof:
        """The same proof with at most `rows` rows of logits per scale, spread evenly."""
        return replace(self, cases=tuple(_thin(case, rows) for case in self.cases))

    def save(self, path: Path) -> None:
        """Write the proof as an .npz file. The same proof gives the same bytes."""
        arrays: Arrays = {
            "labels": np.array(self.labels, np.int32),
            **{name: getattr(self, name) for name in _ARRAYS},
        }
        for c, case in enumerate(self.cases):
            arrays[f"case{c}.labels"] = np.array(case.labels, np.int32)
            arrays[f"case{c}.schedule"] = np.array(case.schedule.scales, np.int32)
            arrays[f"case{c}.guidance_scale"] = np.array(case.guidance.scale)
            arrays[f"case{c}.ramp"] = np.array(case.guidance.rule == "ramp")
            arrays[f"case{c}.max_side"] = np.array(case.guidance.max_side, np.int32)
            arrays[f"case{c}.decoded"] = case.decoded
            for i in range(len(case.schedule)):
                for name in ("tokens", "rows", "logits"):
                    arrays[f"case{c}.{name}{i}"] = getattr(case, name)[i]
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Proof:
        """Read a proof that `save` wrote. Raises ArtifactRefused, OutOfMemory."""
        with open_npz(path, path.name, expected="a recorded proof", fix=_EXPORT_AGAIN) as stored:
            arrays = {name: stored.read(name) for name in stored.infos}
            cases: list[Case] = []
            while f"case{len(cases)}.labels" in arrays:
                cases.append(_read_case(arrays, f"case{len(cases)}."))
            labels = tuple(arrays["labels"].tolist())
            return cls(cases=tuple(cases), labels=labels, **{name: arrays[name] for name in _ARRAYS})

    def require_fit(self, model: ModelFacts) -> None:
        """Raise ArtifactRefused unless there is a case, and every array has the type and shape for this model."""
        with refuse_failures(
            "The proof does not belong to this bundle", expected="a recorded proof", fix=_EXPORT_AGAIN
        ):
            self._require_fit(model)

    def _require_fit(self, model: ModelFacts) -> None:
        """Raises ArtifactRefused, and exceptions of any type for arrays that no model has."""
        labels, (h, w) = len(self.labels), self.latent.shape[-2:]
        pairs: list[tuple[NDArray[Any], tuple[int, ...]]] = [
            (self.modulation, (labels, model.depth, 6, model.width)),
            (self.head_modulation, (labels, 2, model.width)),
            (self.first_input, (labels, 1, model.width)),
            (self.image, _image_shape(model, 1, h, w)),
            (self.latent, (1, model.code_dim, h, w)),
        ]
        for case in self.cases:
            B = len(case.labels)
            for (h, w), tokens, rows, logits in zip(case.schedule, case.tokens, case.rows, case.logits, strict=True):
                pairs += [(tokens, (B, h, w)), (rows, (len(rows),)), (logits, (B, len(rows), model.vocabulary))]
            pairs.append((case.decoded, _image_shape(model, B, h, w)))
            whole = all(array.dtype == np.int32 for array in (*case.tokens, *case.rows))
            inside = whole and all(
                0 <= tokens.min() <= tokens.max() < model.vocabulary and 0 <= rows.min() <= rows.max() < h * w
                for (h, w), tokens, rows in zip(case.schedule, case.tokens, case.rows, strict=True)
            )
            if not inside or not all(0 <= label <= model.null_class for label in (*case.labels, *self.labels)):
                _refuse("labels, tokens or rows out of range", "values within the range of this model")
        if any(array.dtype != np.float32 for array, _ in pairs if array.dtype != np.int32):
            _refuse("arrays of other types", "arrays of float32 and int32")
        wrong = [(array.shape, shape) for array, shape in pairs if array.shape != shape]
        if wrong:
            _refuse(f"an array of shape {wrong[0][0]}", f"shape {wrong[0][1]} for this model")
        if not self.cases or not all(array.size for array, _ in pairs):
            _refuse("no case, or an empty array", "at least one case, and arrays with content")


def _refuse(content: str, expected: str) -> NoReturn:
    got = f"The proof does not belong to this bundle: it has {content}, but needs {expected}."
    raise ArtifactRefused(got, expected=expected, fix=_EXPORT_AGAIN)


def _read_case(arrays: Arrays, prefix: str) -> Case:
    schedule = ScaleSchedule.parse([(h, w) for h, w in arrays[prefix + "schedule"].tolist()])
    rule = "ramp" if arrays[prefix + "ramp"] else "constant"
    guidance = Guidance(float(arrays[prefix + "guidance_scale"]), rule, int(arrays[prefix + "max_side"]))

    def per_scale(name: str) -> tuple[NDArray[Any], ...]:
        return tuple(arrays[f"{prefix}{name}{i}"] for i in range(len(schedule)))

    return Case(
        labels=tuple(arrays[prefix + "labels"].tolist()),
        schedule=schedule,
        guidance=guidance,
        tokens=per_scale("tokens"),
        rows=per_scale("rows"),
        logits=per_scale("logits"),
        decoded=arrays[prefix + "decoded"],
    )


def _image_shape(model: ModelFacts, batch: int, h: int, w: int) -> tuple[int, ...]:
    return batch, 3, h * model.downsampling, w * model.downsampling


def _thin(case: Case, keep: int) -> Case:
    picks = [np.unique(np.linspace(0, len(rows) - 1, min(keep, len(rows))).round().astype(int)) for rows in case.rows]
    return replace(
        case,
        rows=tuple(rows[pick] for rows, pick in zip(case.rows, picks, strict=True)),
        logits=tuple(np.ascontiguousarray(x[:, pick]) for x, pick in zip(case.logits, picks, strict=True)),
    )


def make_proof(model: FlexVAR, tokenizer: Tokenizer, schedule: ScaleSchedule, guidance: Guidance) -> Proof:
    """Run the reference twice: with the given schedule and guidance, and with a short non-square schedule and the other
    guidance rule.

    The first generation has two images, the second has one. All rows of logits are kept; see `thinned`.
    """
    classes = model.config.classes
    labels = (classes // 3, classes - 1, model.config.null_class)
    other = Guidance(4.0, "constant" if guidance.rule == "ramp" else "ramp", guidance.max_side)
    cases = (
        _make_case(model, tokenizer, labels[:2], schedule, guidance),
        _make_case(model, tokenizer, (0,), ScaleSchedule.parse("1_2x3_5x4_6x9"), other),
    )
    with torch.inference_mode():
        labels_M = torch.tensor(labels)
        cond = model.condition(labels_M)
        modulation = torch.stack([block.ada_lin(cond) for block in model.blocks], dim=1)
        image = _image(tokenizer.config.downsampling * 8, tokenizer.config.downsampling * 6)
        return Proof(
            cases=cases,
            labels=labels,
            modulation=modulation.view(*modulation.shape[:2], 6, -1).numpy(),
            head_modulation=model.head_nm.ada_lin(cond).view(len(labels), 2, -1).numpy(),
            first_input=model.first_input(labels_M).numpy(),
            image=image,
            latent=tokenizer.encode(torch.from_numpy(image)).numpy(),
        )


def _make_case(
    model: FlexVAR, tokenizer: Tokenizer, labels: Sequence[int], schedule: ScaleSchedule, guidance: Guidance
) -> Case:
    options = reference_options(guidance, Sampling(max_side=guidance.max_side))
    scales = list(iter_scales(model, labels, schedule, options, shared_noise(SEED)))
    with torch.inference_mode():
        decoded = tokenizer.decode(scales[-1].tokens).numpy()
    return Case(
        labels=tuple(labels),
        schedule=schedule,
        guidance=guidance,
        tokens=tuple(scale.tokens.numpy().astype(np.int32) for scale in scales),
        rows=tuple(np.arange(h * w, dtype=np.int32) for h, w in schedule),
        logits=tuple(scale.logits.numpy() for scale in scales),
        decoded=decoded,
    )


def reference_options(guidance: Guidance, sampling: Sampling) -> Options:
    """The runtime's options in the form of the reference. greedy_scales must be "upstream" or "none"."""
    return Options(
        cfg=guidance.scale,
        rule=guidance.rule,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        upstream_greedy=sampling.greedy_scales == "upstream",
        max_side=guidance.max_side,
    )


def shared_noise(seed: int, first_index: int = 0) -> Uniforms:
    """The runtime's random numbers in the form of the reference: (scale, positions, batch) -> (batch, positions)."""

    def draw(scale: int, positions: int, batch: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([uniforms(seed, first_index + i, scale, positions) for i in range(batch)]))

    return draw


def _image(height: int, width: int) -> Float32:
    """A smooth colourful test image (1, 3, height, width) in −1…1. It is the same on every machine."""
    y, x = np.mgrid[:height, :width].astype(np.float64) / max(height, width)
    waves = [
        np.sin(2 * np.pi * ((c + 1) * x + (3 - c) * y + c / 3)) * np.cos(2 * np.pi * (2 + c) * x * y) for c in range(3)
    ]
    return np.stack(waves)[None].astype(np.float32)
