"""FlexVAR without torch: a bundle goes in, images come out."""

from ._version import __version__
from .bundle import Bundle
from .costs import CostRow, CostTable
from .deadline import Choice
from .errors import (
    ArtifactRefused,
    BackendUnavailable,
    CostUnknown,
    FlexVARError,
    InvalidInput,
    OutOfMemory,
    ParityFailed,
)
from .guidance import Guidance
from .output import GenerationOutput
from .pipeline import FlexVARPipeline, ScaleStep
from .sampling import Sampling
from .schedule import ScaleSchedule

__all__ = [
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
    "Sampling",
    "ScaleSchedule",
    "ScaleStep",
    "__version__",
]
