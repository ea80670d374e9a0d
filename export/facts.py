"""What the reference's configurations say to the bundle: model facts, tables, defaults."""

from __future__ import annotations

import numpy as np

from flexvar_ref import FlexVAR, Tokenizer
from flexvar_runtime.manifest import Defaults, ModelFacts
from flexvar_runtime.schedule import PUBLISHED
from flexvar_runtime.tables import Tables

# The published evaluation at 256 px.
PUBLISHED_DEFAULTS = Defaults(
    schedule=PUBLISHED["10"],
    guidance_scale=2.5,
    guidance_rule="ramp",
    top_k=900,
    top_p=0.95,
    greedy_scales="upstream",
    max_side=16,
)


def model_facts(model: FlexVAR, tokenizer: Tokenizer, class_names: tuple[str, ...] | None = None) -> ModelFacts:
    """Raises ArtifactRefused for sizes no bundle may have."""
    config = model.config
    return ModelFacts(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        head_size=config.head_size,
        classes=config.classes,
        class_names=class_names,
        null_class=config.null_class,
        vocabulary=config.vocabulary,
        code_dim=config.code_dim,
        downsampling=tokenizer.config.downsampling,
        value_range=(-1.0, 1.0),
        position_side=config.position_side,
    )


def tables(model: FlexVAR, tokenizer: Tokenizer) -> Tables:
    """What the host computes from: codebook, position table and input bias."""

    def array(tensor: object) -> np.ndarray:
        return np.ascontiguousarray(tensor.detach().float().cpu().numpy())  # type: ignore[attr-defined]

    return Tables(array(tokenizer.codebook_VD), array(model.pos_1LC[0]), array(model.word_embed.bias))
