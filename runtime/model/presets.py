"""Presets: the settings of published results, each under one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..checks import check_choice
from .guidance import Guidance
from .sampling import Sampling
from .schedule import PUBLISHED, ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of one published result, and its figures.

    weights: the checkpoint that the figures belong to. The settings themselves run on every bundle. fid,
    inception_score: as published, for 50,000 images of the ImageNet classes; None if not known. source: where the
    settings and the figures were published.
    """

    name: str
    schedule: ScaleSchedule
    guidance: Guidance
    sampling: Sampling
    weights: str
    fid: float | None
    inception_score: float | None
    source: str


def _preset(
    name: str, schedule: str, cfg: float, weights: str, fid: float, inception_score: float | None, source: str
) -> Preset:
    """A preset. The rules of guidance and sampling are those of the published evaluation, which are the defaults."""
    return Preset(
        name=name,
        schedule=ScaleSchedule.parse(PUBLISHED[schedule]),
        guidance=Guidance(cfg),
        sampling=Sampling(),
        weights=weights,
        fid=fid,
        inception_score=inception_score,
        source=source,
    )


_FLEXVAR = "arXiv 2502.20313; README of github.com/jiaosiyu1999/FlexVAR"
# cfg differs for each size: it is that of the authors' evaluation scripts
_SAR = "arXiv 2512.06421; README and scripts/eval_SAR_{}.sh of github.com/GengzeZhou/SAR"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        one.name: one
        for one in (
            _preset("flexvar-d16", "10", 2.5, "FlexVARd16-epo179.pth", 3.05, 291.3, _FLEXVAR),
            _preset("flexvar-d20", "10", 2.5, "FlexVARd20-epo249.pth", 2.41, 299.3, _FLEXVAR),
            _preset("flexvar-d24", "10", 2.5, "FlexVARd24-epo349.pth", 2.21, 299.1, _FLEXVAR),
            _preset("flexvar-13step", "13", 2.5, "FlexVARd24-epo349.pth", 2.08, None, _FLEXVAR),
            _preset("flexvar-512px", "512px", 3.0, "FlexVARd24-epo349.pth", 4.43, None, _FLEXVAR),
            _preset("sar-d16", "10", 2.2, "SARd16-epo179.pth", 2.89, 266.6, _SAR.format("d16")),
            _preset("sar-d20", "10", 2.6, "SARd20-epo249.pth", 2.35, 293.3, _SAR.format("d20")),
            _preset("sar-d24", "10", 3.3, "SARd24-epo349.pth", 2.14, 315.5, _SAR.format("d24")),
        )
    }
)
"""Every preset by its name.

FlexVAR's come first, then those of Self-Autoregressive Refinement (SAR). The weights of SAR have the same architecture
and the same tokenizer."""


def preset(name: str) -> Preset:
    """The preset with this name. Raises InvalidInput, which lists the names."""
    return PRESETS[check_choice("preset", name, tuple(PRESETS))]
