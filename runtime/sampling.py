"""`flexvar_runtime.model.sampling` under its public import path."""

from .model.sampling import Sampling, probabilities, sample

__all__ = ["Sampling", "probabilities", "sample"]
