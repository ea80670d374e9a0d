"""Loading and saving of checkpoints: PyTorch files in the layouts that training tools write, and safetensors.

`pth` and `safetensors_files` read files, `layouts` finds the weights in them. `save` writes `X.safetensors` with its
config in `X.json` beside it, which states every size. For all other files the sizes are inferred from the shapes of the
tensors. All forms use the published parameter names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import TokenizerConfig, TransformerConfig
from .errors import CheckpointError, InvalidInput
from .files import write_whole
from .layouts import Weights, check_choice, choose, find_weights
from .parameters import Tensors, assign_parameters, dense, published_name
from .parsing import first_sentence, read_json, refuse_failures, shown, shown_value
from .pth import read_pth
from .safetensors_files import SUFFIX, find_file, read_safetensors
from .sizes import require_parameters, tokenizer_config, transformer_config
from .tokenizer import Tokenizer
from .transformer import FlexVAR

FORMAT = "flexvar-ref/1"
Config = TransformerConfig | TokenizerConfig


def load(transformer: str | Path, tokenizer: str | Path, *, weights: str | None = None) -> tuple[FlexVAR, Tokenizer]:
    """The transformer and the tokenizer of two checkpoints, in evaluation mode, float32, on the CPU.

    The files may have any form that `load_transformer` and `load_tokenizer` accept. weights: "ema" or "model", for
    files that hold both averaged weights (EMA) and others. Raises CheckpointError and InvalidInput.
    """
    check_choice(weights)
    files = _open(tokenizer, "tokenizer"), _open(transformer, "transformer")
    check_choice(weights, [(file.name, file.sets) for file in files])
    vae = _build_tokenizer(files[0], weights)
    return _build_transformer(files[1], weights, vae.codebook_VD), vae


def load_tokenizer(path: str | Path, *, weights: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, in evaluation mode, float32, on the CPU.

    path: a published `FlexVAE.pth`, another PyTorch checkpoint or safetensors of the same parameters, in the layouts of
    `docs/checkpoints.md`, or `X.safetensors` with `X.json` beside it. weights: "ema" or "model", for a file that holds
    both. Raises CheckpointError and InvalidInput.
    """
    check_choice(weights)
    file = _open(path, "tokenizer")
    check_choice(weights, [(file.name, file.sets)])
    return _build_tokenizer(file, weights)


def load_transformer(path: str | Path, codebook_VD: Tensor, *, weights: str | None = None) -> FlexVAR:
    """The transformer of a checkpoint, in evaluation mode, float32, on the CPU.

    path: as for `load_tokenizer`. codebook_VD: the tokenizer's l2-normalised codebook. weights: "ema" or "model", for a
    file that holds both. Raises CheckpointError and InvalidInput.
    """
    check_choice(weights)
    file = _open(path, "transformer")
    check_choice(weights, [(file.name, file.sets)])
    return _build_transformer(file, weights, codebook_VD)


@dataclasses.dataclass(frozen=True)
class _File:
    """An opened checkpoint. config: as stated in the .json beside it, None if the sizes have to be inferred."""

    path: Path
    sets: Sequence[Weights]
    config: Config | None = None

    @property
    def name(self) -> str:
        return self.path.name


def _open(path: str | Path, kind: str) -> _File:
    """Find the weights of a kind in a checkpoint. No tensor is read."""
    path = find_file(Path(path))
    if path.suffix not in (SUFFIX, ".json"):
        return _File(path, find_weights(read_pth(path), kind, path.name))
    content = read_safetensors(path)
    sizes = path.with_suffix(".json")
    if path.suffix == ".json" or (not sizes.exists() and content.metadata.get("format") != FORMAT):
        return _File(path, find_weights(dict(content.state), kind, path.name))
    config = _read_config(sizes, path, kind)
    return _File(path, find_weights(dict(content.state), kind, path.name), config)


def _build_tokenizer(file: _File, weights: str | None) -> Tokenizer:
    state = dense(choose(file.sets, weights, file.name), file.path)
    config = file.config or _infer_sizes(tokenizer_config, state, file.path)
    assert isinstance(config, TokenizerConfig)
    with _refuse_sizes(file.path), torch.device("meta"):  # skips the initialisation of weights that are replaced
        require_parameters(config, state)
        model = Tokenizer(config)
    assign_parameters(model, state, file.path)
    return model.eval()


def _build_transformer(file: _File, weights: str | None, codebook_VD: Tensor) -> FlexVAR:
    state = dense(choose(file.sets, weights, file.name), file.path)
    config = file.config or _infer_sizes(transformer_config, state, file.path)
    assert isinstance(config, TransformerConfig)
    if codebook_VD.shape != (config.vocabulary, config.code_dim):
        raise CheckpointError(
            f"{file.name} was made for {config.vocabulary} codes of dimension {config.code_dim}, but the tokenizer has "
            f"{codebook_VD.shape[0]} codes of dimension {codebook_VD.shape[1]}.",
            expected="a transformer and the tokenizer it was trained with",
            fix="Pass the tokenizer that this transformer was trained with.",
        )
    with _refuse_sizes(file.path), torch.device("meta"):
        require_parameters(config, state)
        model = FlexVAR(config, codebook_VD)
    assign_parameters(model, state, file.path)
    return model.eval()


def save(model: FlexVAR | Tokenizer, path: str | Path) -> None:
    """Write the weights to `path`, which must end in .safetensors, and the config to a .json file beside it.

    Parameters have their published names. Raises InvalidInput for another suffix.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InvalidInput(
            f"{path.name} does not end in .safetensors.",
            expected="a name ending in .safetensors",
            fix="Choose a name that does.",
        )
    state = {published_name(name): value.contiguous() for name, value in model.state_dict().items()}
    config = {
        "format": FORMAT,
        "kind": "transformer" if isinstance(model, FlexVAR) else "tokenizer",
        **dataclasses.asdict(model.config),
    }
    with write_whole(path.with_suffix(".json")) as sizes, write_whole(path) as weights:
        save_file(state, weights, {"format": FORMAT})
        sizes.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _infer_sizes(infer: Any, state: Tensors, path: Path) -> Any:
    """`infer(state)`, with a CheckpointError if the state lacks a parameter or its sizes make no sense."""
    try:
        return infer(state)
    except Exception as error:  # shapes of a foreign file raise exceptions of many types
        reason = f"{error.args[0]} is missing." if isinstance(error, KeyError) else first_sentence(error)
        raise CheckpointError(
            f"The sizes of the model in {path.name} cannot be inferred: {reason}",
            expected="the parameters of a published FlexVAR checkpoint",
            fix="Check that it is a FlexVAR checkpoint and that the download is complete.",
        ) from error


def _refuse_sizes(path: Path) -> Any:
    return refuse_failures(
        CheckpointError,
        f"The model in {path.name} cannot be built",
        expected="sizes that fit the parameters",
        fix="Correct the sizes in its .json file." if path.suffix == SUFFIX else "Use another checkpoint.",
    )


def _read_config(path: Path, weights: Path, kind: str) -> Config:
    """The config that `save` wrote to `path` for the file `weights`."""
    with refuse_failures(
        CheckpointError,
        f"{weights.name} cannot be read as a {kind} with the sizes in {path.name}",
        expected=f"a {kind} saved by flexvar_ref.save ({FORMAT}): safetensors with its JSON config beside it",
        fix=f"Keep beside it the {path.name} that flexvar_ref.save wrote, and do not mix up transformer and tokenizer. "
        f"If another tool wrote {path.name}, move it away: the sizes are then inferred.",
    ):
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("kind") != kind:
            found = [raw.get(key) for key in ("kind", "format")] if isinstance(raw, dict) else [None, None]
            names = [shown(value) if isinstance(value, str) else shown_value(value) for value in found]
            raise ValueError(f"it describes a {names[0]} in format {names[1]}, not a {kind} in {FORMAT}")
        sizes: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if k not in ("format", "kind")
        }
        return TransformerConfig(**sizes) if kind == "transformer" else TokenizerConfig(**sizes)
