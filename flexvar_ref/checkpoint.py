"""Loading and saving of checkpoints: the published `.pth` layouts, and safetensors with a JSON config.

The sizes of a model in a `.pth` are inferred from its tensor shapes. The other form is `X.safetensors` with its config
in `X.json` beside it, which states every size. Both use the published parameter names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import TokenizerConfig, TransformerConfig
from .errors import CheckpointError, FlexVARRefError, InvalidInput
from .files import write_whole
from .pth import State, read_state
from .tokenizer import Tokenizer
from .transformer import FlexVAR

FORMAT = "flexvar-ref/1"
PUBLISHED_GROUPS = 32
MAX_NAMES = 40  # an error message lists this many parameters and counts the rest


def load(transformer: str | Path, tokenizer: str | Path) -> tuple[FlexVAR, Tokenizer]:
    """The transformer and the tokenizer of two checkpoints, in evaluation mode, float32, on the CPU.

    The files may have any form that `load_transformer` and `load_tokenizer` accept. Raises CheckpointError.
    """
    vae = load_tokenizer(tokenizer)
    return load_transformer(transformer, vae.codebook_VD), vae


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint, in evaluation mode, float32, on the CPU.

    path: a published `FlexVAE.pth` (`{"model": state}` or a bare state), a published training checkpoint
    (`{"trainer": {"vae_local": state}}`), or `X.safetensors` with `X.json` beside it. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, config = _load_safetensors(path, TokenizerConfig)
    else:
        state = read_state(path, "tokenizer")
        config = _infer_sizes(tokenizer_config, state, path)
    with torch.device("meta"):  # skips the initialisation of weights that are replaced
        model = Tokenizer(config)
    _assign_parameters(model, state, path)
    return model.eval()


def load_transformer(path: str | Path, codebook_VD: Tensor) -> FlexVAR:
    """The transformer of a checkpoint, in evaluation mode, float32, on the CPU.

    path: a published `.pth` (`{"trainer": {"var_wo_ddp": state}}` or a bare state), or `X.safetensors` with `X.json`
    beside it. codebook_VD: the tokenizer's l2-normalised codebook. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, config = _load_safetensors(path, TransformerConfig)
    else:
        state = read_state(path, "transformer")
        config = _infer_sizes(transformer_config, state, path)
    if codebook_VD.shape != (config.vocabulary, config.code_dim):
        raise CheckpointError(
            f"{path.name} was made for {config.vocabulary} codes of dimension {config.code_dim}, but the tokenizer has "
            f"{codebook_VD.shape[0]} codes of dimension {codebook_VD.shape[1]}.",
            expected="a transformer and the tokenizer it was trained with",
            fix="Pass the tokenizer that this transformer was trained with.",
        )
    with torch.device("meta"):
        model = FlexVAR(config, codebook_VD)
    _assign_parameters(model, state, path)
    return model.eval()


def save(model: FlexVAR | Tokenizer, path: str | Path) -> None:
    """Write the weights to `path`, which must end in .safetensors, and the config to a .json file beside it.

    Parameters have their published names. Raises InvalidInput for another suffix.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise InvalidInput(
            f"{path.name} does not end in .safetensors.",
            expected="a name ending in .safetensors",
            fix="Choose a name that does.",
        )
    state = {published_name(name): value.contiguous() for name, value in model.state_dict().items()}
    config = {"format": FORMAT, "kind": _kind(type(model.config)), **dataclasses.asdict(model.config)}
    with write_whole(path.with_suffix(".json")) as sizes, write_whole(path) as weights:
        save_file(state, weights)
        sizes.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def published_name(name: str) -> str:
    """The published name of a parameter. Only the quantizer is called differently: `quantize` is a method here."""
    return re.sub(r"^quantizer\.", "quantize.", name)


def transformer_config(state: Mapping[str, Tensor]) -> TransformerConfig:
    """Sizes of a transformer, inferred from a published state. Published transformers have as many blocks as heads.

    Any block gives the sizes, so that a missing block can be reported by name later. Raises KeyError, ValueError or
    IndexError if the sizes cannot be inferred.
    """
    heads = _first_match(state, r"blocks\.\d+\.attn\.scale_mul_1H11").shape[1]
    width = state["word_embed.weight"].shape[0]
    depth = max(heads, _count_indices(state, r"blocks\.(\d+)\."))
    if depth > len(state):
        raise ValueError(f"it would have {depth} blocks but only {len(state)} parameters.")
    return TransformerConfig(
        depth=depth,
        heads=heads,
        head_size=width // heads,
        mlp_ratio=_first_match(state, r"blocks\.\d+\.ffn\.fc1\.weight").shape[0] // width,
        classes=state["class_emb.weight"].shape[0] - 1,
        vocabulary=state["head.weight"].shape[0],
        code_dim=state["word_embed.weight"].shape[1],
        position_side=state["pos_1LC"].shape[-1],
        drop_path=0.1 * depth / 24,
    )


def tokenizer_config(state: Mapping[str, Tensor]) -> TokenizerConfig:
    """Sizes of a tokenizer, inferred from a published state. The number of groups is 32, as published.

    Raises KeyError, ValueError or IndexError if the sizes cannot be inferred.
    """
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = _count_indices(state, r"(?:en|de)coder\.conv_blocks\.(\d+)\.")
    if levels > len(state):
        raise ValueError(f"it would have {levels} levels but only {len(state)} parameters.")
    # encoder and decoder mirror each other, so the channels of a level can be read from either
    mirrored = (rf"encoder\.conv_blocks\.{i}|decoder\.conv_blocks\.{levels - 1 - i}" for i in range(levels))
    outputs = [_first_match(state, rf"(?:{level})\.res\.\d+\.conv1\.weight").shape[0] for level in mirrored]
    return TokenizerConfig(
        channels=channels,
        multipliers=tuple(out // channels for out in outputs),
        encoder_blocks=_count_indices(state, r"encoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        decoder_blocks=_count_indices(state, r"decoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        latent_channels=state["quant_conv.weight"].shape[1],
        vocabulary=state["quantize.embedding.weight"].shape[0],
        code_dim=state["quantize.embedding.weight"].shape[1],
        groups=PUBLISHED_GROUPS,
    )


def _first_match(state: Mapping[str, Tensor], pattern: str) -> Tensor:
    for name, value in state.items():
        if re.fullmatch(pattern, name):
            return value
    raise KeyError(pattern.replace("\\", ""))


def _count_indices(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def _infer_sizes(infer: Any, state: State, path: Path) -> Any:
    """`infer(state)`, with a CheckpointError if the state lacks a parameter or its sizes make no sense."""
    try:
        return infer(state)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = f"{error.args[0]} is missing." if isinstance(error, KeyError) else _reason(error)
        raise CheckpointError(
            f"The sizes of the model in {path.name} cannot be inferred: {reason}",
            expected="the parameters of a published FlexVAR checkpoint",
            fix="Check that it is a FlexVAR checkpoint and that the download is complete.",
        ) from error


def _reason(error: Exception) -> str:
    """The fault that an error reports, as the end of a sentence."""
    text = error.got if isinstance(error, FlexVARRefError) else str(error)
    return text if text.endswith(".") else f"{text}."


def _assign_parameters(model: FlexVAR | Tokenizer, state: State, path: Path) -> None:
    """Set the parameters of `model` to the values of `state`, in float32.

    Raises CheckpointError, which names every parameter that is missing, unexpected, or of the wrong shape.
    """
    own = {published_name(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    shapes = [
        f"{name} has {tuple(state[name].shape)}, not {shape}"
        for name, (_, shape) in own.items()
        if name in state and state[name].shape != shape
    ]
    faults = {
        "Missing": sorted(own.keys() - state.keys()),
        "Unexpected": sorted(state.keys() - own.keys()),
        "Wrong shape": shapes,
    }
    if any(faults.values()):
        raise CheckpointError(
            f"{path.name} does not hold the {len(own)} parameters of a model of its size. "
            + " ".join(f"{what}: {_join_names(names)}." for what, names in faults.items() if names),
            expected=f"exactly the {len(own)} parameters of a model of its sizes",
            fix="Use a complete checkpoint. Save a model with fewer blocks than heads with flexvar_ref.save.",
        )
    values = {own[name][0]: _float32(value, name, path) for name, value in state.items()}
    model.load_state_dict(values, assign=True)


def _float32(value: Tensor, name: str, path: Path) -> Tensor:
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(
            f"{path.name} holds {name} as {value.dtype} with layout {value.layout} on device {value.device}, but it "
            "must hold dense floating-point weights.",
            expected="dense floating-point weights",
            fix="Use the checkpoint from before quantisation.",
        )
    value = value.detach().to(torch.float32, copy=True)  # a copy, because the file is memory-mapped
    if not value.isfinite().all():
        raise CheckpointError(
            f"{path.name} holds NaN or infinity in {name}.", expected="finite weights", fix="Use another checkpoint."
        )
    return value


def _join_names(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _kind(config: type) -> str:
    return {TransformerConfig: "transformer", TokenizerConfig: "tokenizer"}[config]


def _load_safetensors(path: Path, config: type) -> tuple[State, Any]:
    kind = _kind(config)
    try:
        raw = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = raw.pop("kind", None), raw.pop("format", None)
        if found != (kind, FORMAT):
            raise ValueError(f"its .json file describes a {found[0]} in format {found[1]}, not a {kind} in {FORMAT}.")
        raw = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return load_file(path), config(**raw)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as a {kind}: {_reason(error)}",
            expected=f"a {kind} saved by flexvar_ref.save ({FORMAT}): safetensors with its JSON config beside it",
            fix="Keep its .json file beside it, and check that transformer and tokenizer were not mixed up.",
        ) from error
