"""Checkpoints: the published `.pth` layouts, and our own safetensors with a JSON config.

Sizes of a `.pth` come from its shapes, so any depth, width, vocabulary and codebook loads. The safetensors form is one
`X.safetensors` beside one `X.json`, which can hold every size; parameter names are the published ones in both.
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
from .errors import CheckpointError
from .pth import State, read_state
from .tokenizer import Tokenizer
from .transformer import FlexVAR

FORMAT = "flexvar-ref/1"
PUBLISHED_GROUPS = 32
NAMED_KEYS = 40  # a message names so many parameters and counts the rest


def load(transformer: str | Path, tokenizer: str | Path) -> tuple[FlexVAR, Tokenizer]:
    """Load both networks in evaluation mode, float32, on the CPU. Raises CheckpointError."""
    vae = load_tokenizer(tokenizer)
    return load_transformer(transformer, vae.codebook_VD), vae


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a published `FlexVAE.pth` (`{"model": state}` or a bare state) or of `X.safetensors`.

    A training checkpoint that keeps it (`{"trainer": {"vae_local": state}}`) will do as well. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, config = _load_safetensors(path, TokenizerConfig)
    else:
        state = read_state(path, "tokenizer")
        config = _sizes(tokenizer_config, state, path)
    with torch.device("meta"):  # no time is spent on an initialisation that is overwritten
        model = Tokenizer(config)
    _fill(model, state, path)
    return model.eval()


def load_transformer(path: str | Path, codebook_VD: Tensor) -> FlexVAR:
    """The transformer of a published `.pth` (`{"trainer": {"var_wo_ddp": state}}` or a bare state) or safetensors.

    codebook_VD: the tokenizer's l2-normalised codebook. Raises CheckpointError.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, config = _load_safetensors(path, TransformerConfig)
    else:
        state = read_state(path, "transformer")
        config = _sizes(transformer_config, state, path)
    if codebook_VD.shape != (config.vocabulary, config.code_dim):
        raise CheckpointError(
            f"{path.name} for {config.vocabulary} codes of dimension {config.code_dim} with a tokenizer of "
            f"{codebook_VD.shape[0]} codes of dimension {codebook_VD.shape[1]}",
            expected="a transformer and the tokenizer it was trained with",
            fix="pass the matching pair",
        )
    with torch.device("meta"):
        model = FlexVAR(config, codebook_VD)
    _fill(model, state, path)
    return model.eval()


def save(model: FlexVAR | Tokenizer, path: str | Path) -> None:
    """Write `path` (ending in .safetensors) and its config beside it as JSON, published parameter names."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"got {path.name}; expected a name ending in .safetensors; fix: rename it")
    state = {published_name(name): value.contiguous() for name, value in model.state_dict().items()}
    config = {"format": FORMAT, "kind": _kind(type(model.config)), **dataclasses.asdict(model.config)}
    weights, sizes = (final.with_name(f".{final.name}.partial") for final in (path, path.with_suffix(".json")))
    save_file(state, weights)
    sizes.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights.replace(path)
    sizes.replace(path.with_suffix(".json"))


def published_name(name: str) -> str:
    """The published name of a parameter of ours: `quantize` is a method here, `quantizer` the module."""
    return re.sub(r"^quantizer\.", "quantize.", name)


def transformer_config(state: Mapping[str, Tensor]) -> TransformerConfig:
    """Sizes of a published transformer state, which has as many blocks as heads.

    Any block tells the sizes, so that one that is missing is found missing. Raises KeyError, ValueError or IndexError
    where a state does not tell them.
    """
    heads = _any(state, r"blocks\.\d+\.attn\.scale_mul_1H11").shape[1]
    width = state["word_embed.weight"].shape[0]
    depth = max(heads, _count(state, r"blocks\.(\d+)\."))
    if depth > len(state):
        raise ValueError(f"{depth} blocks in {len(state)} parameters")
    return TransformerConfig(
        depth=depth,
        heads=heads,
        head_size=width // heads,
        mlp_ratio=_any(state, r"blocks\.\d+\.ffn\.fc1\.weight").shape[0] // width,
        classes=state["class_emb.weight"].shape[0] - 1,
        vocabulary=state["head.weight"].shape[0],
        code_dim=state["word_embed.weight"].shape[1],
        position_side=state["pos_1LC"].shape[-1],
        drop_path=0.1 * depth / 24,
    )


def tokenizer_config(state: Mapping[str, Tensor]) -> TokenizerConfig:
    """Sizes of a published tokenizer state (group normalisation over 32 groups). Raises like transformer_config."""
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, r"(?:en|de)coder\.conv_blocks\.(\d+)\.")
    if levels > len(state):
        raise ValueError(f"{levels} levels in {len(state)} parameters")
    # encoder and decoder mirror each other: either tells the channels of a level
    mirrored = (rf"encoder\.conv_blocks\.{i}|decoder\.conv_blocks\.{levels - 1 - i}" for i in range(levels))
    outputs = [_any(state, rf"(?:{level})\.res\.\d+\.conv1\.weight").shape[0] for level in mirrored]
    return TokenizerConfig(
        channels=channels,
        multipliers=tuple(out // channels for out in outputs),
        encoder_blocks=_count(state, r"encoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        decoder_blocks=_count(state, r"decoder\.conv_blocks\.\d+\.res\.(\d+)\."),
        latent_channels=state["quant_conv.weight"].shape[1],
        vocabulary=state["quantize.embedding.weight"].shape[0],
        code_dim=state["quantize.embedding.weight"].shape[1],
        groups=PUBLISHED_GROUPS,
    )


def _any(state: Mapping[str, Tensor], pattern: str) -> Tensor:
    for name, value in state.items():
        if re.fullmatch(pattern, name):
            return value
    raise KeyError(pattern.replace("\\", ""))


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def _sizes(infer: Any, state: State, path: Path) -> Any:
    """`infer(state)`, where a name it cannot do without, or a size that fits nothing, is a refusal."""
    try:
        return infer(state)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        reason = f"missing: {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path.name}, whose sizes cannot be told ({reason})",
            expected="the parameters of a published FlexVAR checkpoint",
            fix="check that it is one and that the download is complete",
        ) from error


def _fill(model: FlexVAR | Tokenizer, state: State, path: Path) -> None:
    """Give `model` the values of `state` in float32; name every key that is missing, too many or of another shape."""
    own = {published_name(name): (name, tuple(value.shape)) for name, value in model.state_dict().items()}
    shapes = [
        f"{name} {tuple(state[name].shape)} for {shape}"
        for name, (_, shape) in own.items()
        if name in state and state[name].shape != shape
    ]
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "wrong shape": shapes,
    }
    if any(faults.values()):
        raise CheckpointError(
            f"{path.name} with " + "; ".join(f"{what}: {_listed(names)}" for what, names in faults.items() if names),
            expected=f"exactly the {len(own)} parameters of a model of its sizes",
            fix="use a complete checkpoint; one with fewer blocks than heads must be saved with flexvar_ref.save",
        )
    values = {own[name][0]: _float32(value, name, path) for name, value in state.items()}
    model.load_state_dict(values, assign=True)


def _float32(value: Tensor, name: str, path: Path) -> Tensor:
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(
            f"{path.name} with {name} as {value.dtype}, {value.layout}, on {value.device}",
            expected="dense floating-point weights",
            fix="use the checkpoint before quantisation",
        )
    value = value.detach().to(torch.float32, copy=True)  # a copy: what was read is mapped from the file
    if not value.isfinite().all():
        raise CheckpointError(
            f"{path.name} with NaN or infinity in {name}", expected="finite weights", fix="use another checkpoint"
        )
    return value


def _listed(names: list[str]) -> str:
    rest = len(names) - NAMED_KEYS
    return ", ".join(names[:NAMED_KEYS]) + (f" and {rest} more" if rest > 0 else "")


def _kind(config: type) -> str:
    return {TransformerConfig: "transformer", TokenizerConfig: "tokenizer"}[config]


def _load_safetensors(path: Path, config: type) -> tuple[State, Any]:
    kind = _kind(config)
    try:
        raw = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found = raw.pop("kind", None), raw.pop("format", None)
        if found != (kind, FORMAT):
            raise ValueError(f"it is a {found[0]} of format {found[1]}")
        raw = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return load_file(path), config(**raw)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{path.name}, which cannot be read ({error})",
            expected=f"a {kind} saved by flexvar_ref.save ({FORMAT}): safetensors with its JSON config beside it",
            fix="keep the two files together; check that transformer and tokenizer were not mixed up",
        ) from error
