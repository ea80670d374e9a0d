"""The graphs of a bundle and their tensors. Export, manifest and backends take them from here.

Axes: labels M, sequences N (2B with guidance), images B, new tokens L, past tokens P, height × width of a token map.
`height_x16` is 16 times `height`: a side of the image. `prefill` takes all given scales at once. Its input `scale` has
the scale of every token; a token attends to the tokens of its own scale and of the scales before.

The outputs of `condition` are inputs of the same names in `step` and `prefill`: the modulation of every block and of
the head. Each part is one tensor (N, 1, C), so that no graph has to slice it. In bundles of schema version 1 the parts
of all blocks are one tensor, and those of the head another.
"""

from __future__ import annotations

from .facts import ModelFacts
from .precision import Precision
from .tensors import GraphSpec, TensorSpec

SCHEMA_VERSION = 3  # of the manifest that this version writes
JOINED_MODULATION = (1,)  # schema versions whose graphs pass the modulation of all blocks as one tensor

CONDITION, STEP, DECODE, ENCODE = REQUIRED = ("condition", "step", "decode", "encode")
PREFILL = "prefill"
GRAPHS = (*REQUIRED, PREFILL)
"""`prefill` only makes given scales faster. Without it `step` runs over them."""
WEIGHTS_OF = {PREFILL: STEP}
"""Graphs that use the weight file of another graph."""
TABLES_FILE = "tables.npz"
DEVICE_LABELS = 16  # labels in every run of the condition graph on a GPU; engines are built for this number
OPSET = 23
"""Version of the ONNX operators in every graph: the first with Attention."""
MODULATION = ("gamma1", "gamma2", "scale1", "scale2", "shift1", "shift2")
"""Parts of a block's modulation, in the order of a checkpoint. 1 is of the attention, 2 of the MLP."""
HEAD_MODULATION = ("head_scale", "head_shift")


def past_names(depth: int) -> tuple[str, ...]:
    """Inputs of `step` with the past: keys of every block, then values of every block."""
    return tuple(f"past_{part}_{i}" for part in "kv" for i in range(depth))


def new_names(depth: int) -> tuple[str, ...]:
    """Outputs of `step` with the new keys and values, in the order of `past_names`."""
    return tuple(f"new_{part}_{i}" for part in "kv" for i in range(depth))


def modulation_names(depth: int) -> tuple[str, ...]:
    """Outputs of `condition` and inputs of `step`: the first part of every block, then the second, and so on."""
    return tuple(f"{part}_{i}" for part in MODULATION for i in range(depth))


def graph_specs(model: ModelFacts, precision: str, schema_version: int = SCHEMA_VERSION) -> dict[str, GraphSpec]:
    """Inputs and outputs of every graph of a model at a precision, in bundles of a schema version.

    Only keys and values can be in half precision. All other inputs and outputs are float32 or int32.
    """
    C, D, V, depth = model.width, model.code_dim, model.vocabulary, model.depth
    kv = Precision(precision).dtype
    factor = model.downsampling

    def f32(name: str, *axes: str | int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", axes=axes)

    def i32(name: str, *axes: str | int) -> TensorSpec:
        return TensorSpec(name=name, dtype="int32", axes=axes)

    def cache(name: str, tokens: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=kv, axes=(tokens, "sequences", model.heads, model.head_size))

    def modulation(axis: str, keys_only: bool = False) -> tuple[TensorSpec, ...]:
        """keys_only: for `prefill`, which computes keys and values only. They need scale1 and shift1 of the last block,
        not its other parts. A single block has all parts, because each part needs at least one tensor."""
        if schema_version in JOINED_MODULATION:
            return (f32("modulation", axis, depth, 6, C),)
        last = f"_{depth - 1}" if keys_only and depth > 1 else "none"
        unused = {part + last for part in MODULATION if part not in ("scale1", "shift1")}
        return tuple(f32(name, axis, 1, C) for name in modulation_names(depth) if name not in unused)

    def head(axis: str) -> tuple[TensorSpec, ...]:
        if schema_version in JOINED_MODULATION:
            return (f32("head_modulation", axis, 2, C),)
        return tuple(f32(name, axis, 1, C) for name in HEAD_MODULATION)

    return {
        CONDITION: GraphSpec(
            file="condition.onnx",
            inputs=(i32("labels", "labels"),),
            outputs=(*modulation("labels"), *head("labels"), f32("first_input", "labels", 1, C)),
        ),
        STEP: GraphSpec(
            file="step.onnx",
            inputs=(
                f32("codes", "sequences", "new", D),
                f32("offset", "sequences", "new", C),
                *modulation("sequences"),
                *head("sequences"),
                i32("cond_rows", "images"),
                i32("uncond_rows", "images"),
                f32("t", "images"),
                *(cache(name, "past") for name in past_names(depth)),
            ),
            outputs=(f32("logits", "images", "new", V), *(cache(name, "new") for name in new_names(depth))),
        ),
        PREFILL: GraphSpec(
            file="prefill.onnx",
            inputs=(
                f32("codes", "sequences", "new", D),
                f32("offset", "sequences", "new", C),
                *modulation("sequences", keys_only=True),
                i32("scale", "new"),
            ),
            outputs=tuple(cache(name, "new") for name in new_names(depth)),
        ),
        DECODE: GraphSpec(
            file="decode.onnx",
            inputs=(i32("tokens", "images", "height", "width"),),
            outputs=(f32("image", "images", 3, f"height_x{factor}", f"width_x{factor}"),),
        ),
        ENCODE: GraphSpec(
            file="encode.onnx",
            inputs=(f32("image", "images", 3, f"height_x{factor}", f"width_x{factor}"),),
            outputs=(f32("latent", "images", D, "height", "width"),),
        ),
    }
