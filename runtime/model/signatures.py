"""The graphs of a bundle and their tensors, declared once: export, manifest, backends and checks derive from here.

Axes: labels M, sequences N (2B under guidance), images B, new tokens L, past tokens P, height × width of a token map;
`height_x16` is 16 times `height`: a side of the image. `prefill` takes all given scales at once; `scale` says to which
of them a token belongs, and it attends to those of its own and of smaller scales.

What `condition` computes goes to the inputs of the same names in `step` and `prefill`: the modulation of every block
and of the head, one tensor (N, 1, C) for each part, so that no graph has to slice it. In bundles of schema version 1
the parts of all blocks are one tensor, and those of the head another.
"""

from __future__ import annotations

from .facts import ModelFacts
from .precision import Precision
from .tensors import GraphSpec, TensorSpec

SCHEMA_VERSION = 2  # of the manifest that this version writes
JOINED_MODULATION = (1,)  # schema versions whose graphs pass the modulation of all blocks as one tensor

CONDITION, STEP, DECODE, ENCODE = REQUIRED = ("condition", "step", "decode", "encode")
PREFILL = "prefill"
GRAPHS = (*REQUIRED, PREFILL)
"""`prefill` only makes given scales faster: what lacks it runs `step` over them."""
WEIGHTS_OF = {PREFILL: STEP}
"""Graphs that take their weights from another's file."""
TABLES_FILE = "tables.npz"
DEVICE_LABELS = 16  # labels in every run of the condition graph on a device; engines are built for it
OPSET = 23
"""Version of the ONNX operators in every graph: the first with Attention; every runtime in use takes it."""
MODULATION = ("gamma1", "gamma2", "scale1", "scale2", "shift1", "shift2")
"""Parts of a block's modulation, 1 of its attention and 2 of its MLP, in the order in which a checkpoint has them."""
HEAD_MODULATION = ("head_scale", "head_shift")


def past_names(depth: int) -> tuple[str, ...]:
    """Inputs of `step` that hold the past: keys of every block, then values of every block."""
    return tuple(f"past_{part}_{i}" for part in "kv" for i in range(depth))


def new_names(depth: int) -> tuple[str, ...]:
    """Outputs of `step` that go to the tail of the same buffers, in the order of `past_names`."""
    return tuple(f"new_{part}_{i}" for part in "kv" for i in range(depth))


def modulation_names(depth: int) -> tuple[str, ...]:
    """Outputs of `condition` and inputs of `step`: each part of every block, part by part."""
    return tuple(f"{part}_{i}" for part in MODULATION for i in range(depth))


def graph_specs(model: ModelFacts, precision: str, schema_version: int = SCHEMA_VERSION) -> dict[str, GraphSpec]:
    """Inputs and outputs of every graph of a model at a precision, as bundles of a
    schema version have them.

    Only keys and values travel in half precision; everything else that crosses a graph's border is float32 or int32.
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
        """keys_only: for `prefill`. Of the last block only scale1 and shift1 stay, which its keys and values depend on.
        With a single block all parts stay, because each part needs at least one tensor."""
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
