"""The public names of `flexvar_runtime`."""

from .bundle.opening import Bundle
from .deadlines.choice import Choice
from .deadlines.costs import CostRow, CostTable
from .errors import (
    ArtifactRefused,
    BackendUnavailable,
    CostUnknown,
    FlexVARError,
    InvalidInput,
    OutOfMemory,
    ParityFailed,
)
from .model.guidance import Guidance
from .model.presets import PRESETS, Preset, preset
from .model.sampling import Sampling
from .model.schedule import ScaleSchedule
from .output import GenerationOutput, ScaleStep
from .pipeline import FlexVARPipeline

__all__ = [
    "PRESETS",
    "ArtifactRefused",
    "BackendUnavailable",
    "Bundle",
    "Choice",
    "CostRow",
    "CostTable",
    "CostUnknown",
    "FlexVARError",
    "FlexVARPipeline",
    "GenerationOutput",
    "Guidance",
    "InvalidInput",
    "OutOfMemory",
    "ParityFailed",
    "Preset",
    "Sampling",
    "ScaleSchedule",
    "ScaleStep",
    "preset",
]
