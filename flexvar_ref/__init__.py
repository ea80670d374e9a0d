"""FlexVAR in PyTorch: readable, trainable, and equal to the published model. All other packages must agree with it.

Names are imported on first use, so that the command line can register `flexvar train` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load, load_tokenizer, load_transformer, save
    from .config import TokenizerConfig, TransformerConfig
    from .editing import inpaint, refine
    from .errors import CheckpointError, FlexVARRefError
    from .generation import Given, Options, ScaleOutput, generate, iter_scales
    from .scales import as_scales, token_count
    from .tokenizer import Tokenizer
    from .transformer import FlexVAR, KVCache, block_causal_mask

__all__ = [
    "CheckpointError",
    "FlexVAR",
    "FlexVARRefError",
    "Given",
    "KVCache",
    "Options",
    "ScaleOutput",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "as_scales",
    "block_causal_mask",
    "generate",
    "inpaint",
    "iter_scales",
    "load",
    "load_tokenizer",
    "load_transformer",
    "refine",
    "save",
    "token_count",
]

_MODULES = {
    "checkpoint": ("load", "load_tokenizer", "load_transformer", "save"),
    "config": ("TokenizerConfig", "TransformerConfig"),
    "editing": ("inpaint", "refine"),
    "errors": ("CheckpointError", "FlexVARRefError"),
    "generation": ("Given", "Options", "ScaleOutput", "generate", "iter_scales"),
    "scales": ("as_scales", "token_count"),
    "tokenizer": ("Tokenizer",),
    "transformer": ("FlexVAR", "KVCache", "block_causal_mask"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
