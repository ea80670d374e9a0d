"""FlexVAR in PyTorch: readable, trainable, equal to the published model. The definition of correct."""

from .checkpoint import load, load_tokenizer, load_transformer, save
from .config import TokenizerConfig, TransformerConfig
from .errors import CheckpointError
from .generate import Options, ScaleOutput, generate, iter_scales
from .scales import as_scales, token_count
from .tokenizer import Tokenizer
from .transformer import FlexVAR, KVCache, block_causal_mask

__all__ = [
    "CheckpointError",
    "FlexVAR",
    "KVCache",
    "Options",
    "ScaleOutput",
    "Tokenizer",
    "TokenizerConfig",
    "TransformerConfig",
    "as_scales",
    "block_causal_mask",
    "generate",
    "iter_scales",
    "load",
    "load_tokenizer",
    "load_transformer",
    "save",
    "token_count",
]
