"""Checkpoints: the layouts that load, and the files that are refused. No code in a file is ever run."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import pickle
import re
import struct
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexvar_ref
from flexvar_ref import CheckpointError, FlexVAR, Tokenizer, TokenizerConfig, TransformerConfig, checkpoint
from flexvar_ref.errors import InvalidInput
from flexvar_ref.stored import StoredTensor
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, tokenizer_state, transformer_state

Pair = tuple[FlexVAR, Tokenizer]
State = dict[str, torch.Tensor]
LABELS, SCALES = [1, 10], "1_2_3x2"


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    return transformer_state(tiny_transformer()), tokenizer_state(TINY_TOKENIZER)


@pytest.fixture
def transformer(states: tuple[State, State]) -> State:
    return dict(states[0])


@pytest.fixture
def vae(states: tuple[State, State]) -> State:
    return dict(states[1])


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(content: Any, **options: Any) -> Path:
        torch.save(content, tmp_path / "some.pth", **options)
        return tmp_path / "some.pth"

    return write


@pytest.fixture
def load_transformer(tiny: Pair) -> Callable[[Path], FlexVAR]:
    return lambda path: flexvar_ref.load_transformer(path, tiny[1].codebook_VD)


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, others = model.state_dict(), other.state_dict()
    assert ours.keys() == others.keys()
    for name in ours:
        assert torch.equal(ours[name], others[name]), name
        assert ours[name].dtype == torch.float32, name


def refusal(load: Callable[[Path], object], path: Path) -> str:
    """What is wrong with a checkpoint, as the error says. Every field of the error must be filled in."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    error = caught.value
    assert error.got.endswith(".") and error.expected and error.fix.endswith(".")
    assert str(error) == f"{error.got} {error.fix}" and len(error.got) < 2000
    return error.got


def named(text: str, names: Iterable[str]) -> set[str]:
    """The parameters of `names` that a text mentions."""
    return set(names) & set(re.findall(r"\w[\w.]*\w", text))


# --- layouts that load ---------------------------------------------------------------------------------------------


def training_extras() -> dict[str, Any]:
    """Values that training checkpoints hold beside the weights: options, optimiser state, counters."""
    return {
        "var_opt": {
            "optimizer": {
                "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "lr": np.float64(1e-4)}},
                "param_groups": [{"lr": np.float32(1e-4), "betas": (0.9, 0.95), "params": [0, 1], "fused": None}],
            },
            "scaler": None,
        },
        "config": {
            "patch_nums": (1, 2, 3),
            "args": argparse.Namespace(
                lr=1e-4, out=pathlib.PurePosixPath("runs").name, seed=np.int64(3), flags={"a", 1}
            ),
            "more": types.SimpleNamespace(ratio=np.float16(0.5), ok=np.bool_(True)),
            "array": np.arange(3),
            "strings": np.array(["a", "b"]),
            "counts": collections.defaultdict(list, a=[1]),
            "ordered": collections.OrderedDict(b=complex(1, 2)),
            "frozen": frozenset({1}),
            "path": pathlib.Path("runs") / "d16",
            "dtype": torch.float16,
            "device": torch.device("cpu"),
            "size": torch.Size([1, 2]),
            "blob": b"\x00\xff",
            "none": None,
        },
    }


def training_checkpoint(transformer: State, vae: State) -> dict[str, Any]:
    trainer = {"var_wo_ddp": transformer, "vae_local": vae, **training_extras()}
    return {"epoch": np.int64(179), "iter": 0, "args": argparse.Namespace(depth=2), "trainer": trainer}


TRANSFORMER_LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "published": lambda t, v: {"trainer": {"var_wo_ddp": t}},
    "bare": lambda t, v: t,
    "training": training_checkpoint,
    "ordered": lambda t, v: {"trainer": collections.OrderedDict(var_wo_ddp=collections.OrderedDict(t))},
    "data parallel": lambda t, v: {"module." + k: x for k, x in t.items()},
    "compiled": lambda t, v: {"_orig_mod." + k: x for k, x in t.items()},
    "both": lambda t, v: {"_orig_mod.module." + k: x for k, x in t.items()},
    "the other way": lambda t, v: {"module._orig_mod." + k: x for k, x in t.items()},
    "masked": lambda t, v: {**t, "attn_bias_for_masking": torch.zeros(1, 1, 680, 680).fill_(-torch.inf)},
    "masked, wrapped": lambda t, v: {
        f"module.{k}": x for k, x in {**t, "attn_bias_for_masking": torch.ones(1)}.items()
    },
    "parameters": lambda t, v: {k: torch.nn.Parameter(x) for k, x in t.items()},
    "float64": lambda t, v: {k: x.double() for k, x in t.items()},
}


@pytest.mark.parametrize("layout", TRANSFORMER_LAYOUTS)
def test_transformer_layouts(
    layout: str,
    transformer: State,
    vae: State,
    written: Callable[..., Path],
    load_transformer: Callable[[Path], FlexVAR],
    tiny: Pair,
) -> None:
    content = TRANSFORMER_LAYOUTS[layout](transformer, vae)
    for zipped in (True, False):
        model = load_transformer(written(content, _use_new_zipfile_serialization=zipped))
        assert_same(model, tiny[0])
        assert model.config == tiny[0].config
        assert not model.training
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        assert not model.blocks[0].attn.zero_k_bias.requires_grad


TOKENIZER_LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "published": lambda t, v: {"model": v},
    "bare": lambda t, v: v,
    "training": training_checkpoint,
    "more than the model": lambda t, v: {
        "model": v,
        "discriminator": {"main.0.weight": torch.zeros(3)},
        "optimizer": training_extras()["var_opt"],
        "args": argparse.Namespace(lr=np.float64(1e-4)),
        "steps": np.int64(400000),
    },
    "data parallel": lambda t, v: {"model": {"module." + k: x for k, x in v.items()}},
    "without the usage counter": lambda t, v: {k: x for k, x in v.items() if k != "quantize.codebook_used"},
}


@pytest.mark.parametrize("layout", TOKENIZER_LAYOUTS)
def test_tokenizer_layouts(
    layout: str, transformer: State, vae: State, written: Callable[..., Path], tiny: Pair
) -> None:
    content = TOKENIZER_LAYOUTS[layout](transformer, vae)
    for zipped in (True, False):
        tokenizer = flexvar_ref.load_tokenizer(written(content, _use_new_zipfile_serialization=zipped))
        assert_same(tokenizer, tiny[1])
        assert tokenizer.config == TINY_TOKENIZER
        assert not tokenizer.training


def test_both_from_one_training_checkpoint(
    transformer: State, vae: State, written: Callable[..., Path], tiny: Pair
) -> None:
    path = written(training_checkpoint(transformer, vae))
    for loaded, expected in zip(flexvar_ref.load(str(path), str(path)), tiny, strict=True):
        assert_same(loaded, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states(
    dtype: torch.dtype, transformer: State, vae: State, written: Callable[..., Path], tmp_path: Path
) -> None:
    halves = [{k: x.to(dtype) for k, x in state.items()} for state in (transformer, vae)]
    torch.save({"model": halves[1]}, tmp_path / "vae.pth")
    model, tokenizer = flexvar_ref.load(written(halves[0]), tmp_path / "vae.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, halves[0][name].float()), name
    torch.testing.assert_close(model.codebook_VD.norm(dim=-1), torch.ones(512))  # normalised in float32
    assert next(tokenizer.parameters()).dtype == torch.float32


def test_a_loaded_model_does_not_need_its_file(
    transformer: State, written: Callable[..., Path], load_transformer: Callable[[Path], FlexVAR], tiny: Pair
) -> None:
    path = written(transformer)
    model = load_transformer(path)
    path.write_bytes(b"\x00" * path.stat().st_size)
    assert_same(model, tiny[0])


# --- safetensors ---------------------------------------------------------------------------------------------------

ODD_TRANSFORMER = TransformerConfig(
    depth=1,
    heads=3,
    head_size=10,
    mlp_ratio=2,
    classes=4,
    vocabulary=33,
    code_dim=5,
    position_side=7,
    label_dropout=0.2,
    drop_path=0.3,
)
ODD_TOKENIZER = TokenizerConfig(
    channels=6,
    multipliers=(2, 1, 3, 1),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=7,
    vocabulary=33,
    code_dim=5,
    groups=3,
)


@pytest.mark.parametrize(
    ("transformer_sizes", "tokenizer_sizes"),
    [(tiny_transformer(), TINY_TOKENIZER), (ODD_TRANSFORMER, ODD_TOKENIZER)],
    ids=["tiny", "odd"],
)
def test_round_trip(tmp_path: Path, transformer_sizes: TransformerConfig, tokenizer_sizes: TokenizerConfig) -> None:
    tokenizer = Tokenizer(tokenizer_sizes).eval()
    model = FlexVAR(transformer_sizes, tokenizer.codebook_VD).eval()
    flexvar_ref.save(model, tmp_path / "t.safetensors")
    flexvar_ref.save(tokenizer, str(tmp_path / "v.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.safetensors", "v.json", "v.safetensors"]
    model_again, tokenizer_again = flexvar_ref.load(tmp_path / "t.safetensors", tmp_path / "v.safetensors")
    assert (model_again.config, tokenizer_again.config) == (transformer_sizes, tokenizer_sizes)
    assert_same(model_again, model)
    assert_same(tokenizer_again, tokenizer)
    tokens, image = flexvar_ref.generate(model_again, tokenizer_again, [1], "1_2_3x2")
    side = tokenizer_sizes.downsampling
    assert image.shape == (1, 3, 3 * side, 2 * side) and tokens[-1].max() < tokenizer_sizes.vocabulary


def test_saved_names_are_the_published_ones(tmp_path: Path, tiny: Pair, vae: State) -> None:
    from safetensors import safe_open

    flexvar_ref.save(tiny[1], tmp_path / "v.safetensors")
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert set(file.keys()) == vae.keys() - {"quantize.codebook_used"}


def test_a_half_precision_model_round_trips_in_float32(tmp_path: Path, tiny: Pair) -> None:
    half = copy.deepcopy(tiny[0]).bfloat16()
    flexvar_ref.save(half, tmp_path / "t.safetensors")
    assert_same(flexvar_ref.load_transformer(tmp_path / "t.safetensors", tiny[1].codebook_VD), half.float())


def test_another_suffix_is_refused_when_saving(tmp_path: Path, tiny: Pair) -> None:
    with pytest.raises(InvalidInput, match=r"^t\.pth "):
        flexvar_ref.save(tiny[0], tmp_path / "t.pth")


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda path, config: path.with_suffix(".json").unlink(), "t.json"),
        (lambda path, config: path.unlink(), "t.safetensors"),
        (lambda path, config: path.write_bytes(path.read_bytes()[:-10]), "t.safetensors"),
        (lambda path, config: path.with_suffix(".json").write_text("[1, 2]"), "t.safetensors"),
        (lambda path, config: path.with_suffix(".json").write_text("{"), "t.safetensors"),
        (lambda path, config: config.update(format="flexvar-ref/9"), "flexvar-ref/9"),
        (lambda path, config: config.update(width=3), "width"),
        (lambda path, config: config.pop("depth"), "depth"),
        (lambda path, config: config.update(depth="2"), "depth is '2'"),
        (lambda path, config: config.update(depth=2.5), "depth is 2.5"),
        (lambda path, config: config.update(depth=3), "blocks.2."),
        (lambda path, config: config.update(depth=1), "blocks.1."),
        (lambda path, config: config.update(classes=9), "class_emb.weight has (11, 128), not (10, 128)"),
    ],
)
def test_damaged_safetensors_are_refused(
    tmp_path: Path, tiny: Pair, edit: Any, fault: str, load_transformer: Callable[[Path], FlexVAR]
) -> None:
    path = tmp_path / "t.safetensors"
    flexvar_ref.save(tiny[0], path)
    config = json.loads(path.with_suffix(".json").read_text())
    before = dict(config)
    edit(path, config)
    if config != before:
        path.with_suffix(".json").write_text(json.dumps(config))
    assert fault in refusal(load_transformer, path)


# --- refusals ------------------------------------------------------------------------------------------------------


class Payload:
    """Pickles to a call that creates a file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def payloads(target: Path) -> dict[str, Any]:
    return {
        "os.system": Payload(os.system, f"touch {target}"),
        "eval": Payload(eval, f"open({str(target)!r}, 'w')"),
        "open": Payload(open, str(target), "w"),
        "Path.touch": Payload(pathlib.Path.touch, target),
        "numpy": Payload(np.save, str(target), 1),
    }


@pytest.mark.parametrize("payload", payloads(Path()))
def test_code_in_a_pickle_is_never_run(
    payload: str,
    tmp_path: Path,
    transformer: State,
    written: Callable[..., Path],
    load_transformer: Callable[[Path], FlexVAR],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither among the weights, nor beside them, nor inside options. A file that asks for it openly is refused."""
    target = tmp_path / "ran.npy"
    hostile = payloads(target)[payload]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    contents: list[Any] = [
        {**transformer, "head.bias": hostile},
        {"trainer": {"var_wo_ddp": transformer}, "x": hostile},
        {"trainer": {"var_wo_ddp": transformer}, "args": argparse.Namespace(x=hostile)},
    ]
    openly = payload in ("os.system", "eval", "open")
    for place, (content, zipped) in enumerate(itertools.product(contents, (True, False))):
        path = written(content, _use_new_zipfile_serialization=zipped)
        if openly:
            assert "asks to run " in refusal(load_transformer, path)
        elif place < 2:
            assert "head.bias" in refusal(load_transformer, path)
        else:
            load_transformer(path)
        refusal(flexvar_ref.load_tokenizer, path)
    assert not target.exists()


def test_payloads_run_in_a_plain_pickle(tmp_path: Path) -> None:
    """Negative control: each of them creates its file."""
    for i, name in enumerate(payloads(Path())):
        target = tmp_path / f"{i}.npy"
        pickle.loads(pickle.dumps(payloads(target)[name]))
        assert target.exists(), name


def test_a_stand_in_is_no_weight(
    written: Callable[..., Path], transformer: State, load_transformer: Callable[[Path], FlexVAR]
) -> None:
    transformer["head.bias"] = argparse.Namespace()  # type: ignore[assignment]
    assert "head.bias" in refusal(load_transformer, written({"head.bias": transformer["head.bias"]}))


@pytest.fixture
def load_state(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object], State], str]:
    """(load, state) -> the refusal of a state. Nothing is read from a file, and networks of one size are built once."""
    monkeypatch.setattr(checkpoint, "FlexVAR", functools.cache(FlexVAR))
    monkeypatch.setattr(checkpoint, "Tokenizer", functools.cache(Tokenizer))

    def refused(load: Callable[[Path], object], state: State) -> str:
        stored = {name: StoredTensor(tuple(x.shape), x.dtype, lambda x=x: x) for name, x in state.items()}  # type: ignore[misc]
        monkeypatch.setattr(checkpoint, "read_pth", lambda path: stored)
        return refusal(load, Path("some.pth"))

    return refused


def without(state: State, names: set[str]) -> State:
    return {name: value for name, value in state.items() if name not in names}


def test_every_missing_parameter_is_named(
    transformer: State, vae: State, load_transformer: Callable[[Path], FlexVAR], load_state: Any
) -> None:
    """The error names the parameter that is missing and no other."""
    del vae["quantize.codebook_used"]
    for state, load in ((transformer, load_transformer), (vae, flexvar_ref.load_tokenizer)):
        for name in state:
            assert named(load_state(load, without(state, {name})), state) == {name}


def test_every_missing_block_is_named(load_transformer: Callable[[Path], FlexVAR], tiny: Pair, load_state: Any) -> None:
    state = transformer_state(dataclasses.replace(tiny[0].config, depth=4, heads=4, head_size=4))
    for block in range(4):
        missing = {name for name in state if name.startswith(f"blocks.{block}.")}
        message = load_state(load_transformer, without(state, missing))
        assert named(message, state) == missing and str(len(state)) in message


def test_every_missing_level_is_named(vae: State, load_state: Any) -> None:
    del vae["quantize.codebook_used"]
    for level in (f"{part}coder.conv_blocks.{i}." for part in ("en", "de") for i in range(3)):
        missing = {name for name in vae if name.startswith(level)}
        assert named(load_state(flexvar_ref.load_tokenizer, without(vae, missing)), vae) == missing


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"extra": torch.zeros(2)}, "Unexpected: extra."),
        ({"head.bias": torch.zeros(511)}, "head.bias has (511,), not (512,)"),
        ({"word_embed.weight": torch.zeros(128)}, "sizes"),
        ({"class_emb.weight": torch.zeros(1, 128)}, "classes is 0"),
        ({"head.bias": torch.full((512,), torch.nan)}, "NaN or infinity in head.bias"),
        ({"head.bias": torch.full((512,), 1e300, dtype=torch.float64)}, "NaN or infinity in head.bias"),
        ({"head.bias": torch.zeros(512, dtype=torch.int8)}, "head.bias as torch.int8"),
        ({"head.bias": torch.zeros(512).to_sparse()}, "head.bias as torch._utils._rebuild_sparse_tensor"),
        ({"head.bias": torch.zeros(512, device="meta")}, "meta"),
        ({"blocks.999999999.ffn.fc1.weight": torch.zeros(1)}, "1000000000 blocks"),
        ({"blocks.0.attn.scale_mul_1H11": torch.zeros(1).expand(1, 10**9, 1, 1)}, "1000000000 blocks"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    change: State,
    fault: str,
    transformer: State,
    written: Callable[..., Path],
    load_transformer: Callable[[Path], FlexVAR],
) -> None:
    assert fault in refusal(load_transformer, written({**transformer, **change}))


def test_long_lists_are_cut(transformer: State, load_transformer: Callable[[Path], FlexVAR], load_state: Any) -> None:
    transformer.update({f"extra.{i}": torch.zeros(1) for i in range(1000)})
    message = load_state(load_transformer, transformer)
    assert "and 960 more" in message and len(message) < 1500


def test_swapped_pth_files_are_named(tmp_path: Path, transformer: State, vae: State) -> None:
    """In the published layouts and as bare states: the error says what the file holds."""
    paths = tmp_path / "t.pth", tmp_path / "v.pth"
    for layouts in ((lambda t: {"trainer": {"var_wo_ddp": t}}, lambda v: {"model": v}), (lambda t: t, lambda v: v)):
        for path, layout, state in zip(paths, layouts, (transformer, vae), strict=True):
            torch.save(layout(state), path)
        message = refusal(lambda path: flexvar_ref.load(path, paths[0]), paths[0])
        assert message.startswith("t.pth holds a transformer")
        message = refusal(lambda path: flexvar_ref.load(path, paths[1]), paths[1])
        assert message.startswith("v.pth holds a tokenizer")


def test_swapped_safetensors_are_named(tmp_path: Path, tiny: Pair) -> None:
    for network, name in zip(tiny, ("t", "v"), strict=True):
        flexvar_ref.save(network, tmp_path / f"{name}.safetensors")
    message = refusal(lambda path: flexvar_ref.load(tmp_path / "v.safetensors", path), tmp_path / "t.safetensors")
    assert message.startswith("t.safetensors ") and "a transformer in format flexvar-ref/1" in message


def test_another_tokenizer_is_refused(tmp_path: Path, tiny_checkpoint: tuple[Path, Path]) -> None:
    other = dataclasses.replace(TINY_TOKENIZER, vocabulary=256)
    torch.save({"model": tokenizer_state(other)}, tmp_path / "vae.pth")
    message = refusal(lambda path: flexvar_ref.load(path, tmp_path / "vae.pth"), tiny_checkpoint[0])
    assert message.startswith("transformer.pth ") and "512 codes" in message and "256 codes" in message


def test_other_content_is_refused(written: Callable[..., Path], load_transformer: Callable[[Path], FlexVAR]) -> None:
    empty: list[Any] = [[], None, {}, {"model": {}}, {"x": {}}]
    for content in (*empty, [1, 2], "text", {"model": {"a": 1}}, torch.zeros(3), {1: torch.zeros(3)}):
        path = written(content)
        for load in (load_transformer, flexvar_ref.load_tokenizer):
            assert refusal(load, path).startswith("some.pth holds ")


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("none.pth", "."):
        assert refusal(flexvar_ref.load_tokenizer, tmp_path / name).startswith(f"{tmp_path / name} ")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_cut_download_is_refused(
    zipped: bool, transformer: State, written: Callable[..., Path], load_transformer: Callable[[Path], FlexVAR]
) -> None:
    path = written(transformer, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for keep in (0, 1, 100, -1000, -1):
        path.write_bytes(content[:keep])
        assert refusal(load_transformer, path).startswith("some.pth cannot be read")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickles_are_refused(written: Callable[..., Path], load_transformer: Callable[[Path], FlexVAR]) -> None:
    """Whatever a damaged pickle makes its parser raise, the error is a CheckpointError."""
    path = written({"a": [1.5, "x", torch.zeros(3)], "b": (1, {2: None})}, _use_new_zipfile_serialization=False)
    original = path.read_bytes()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        content = bytearray(original)
        for position in rng.integers(0, len(content), 8):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        refusal(load_transformer, path)


def test_other_files_are_refused(tmp_path: Path, load_transformer: Callable[[Path], FlexVAR]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    for content in (b"<!DOCTYPE html>", pointer, b"\x80\x02.", b"PK\x03\x04", struct.pack("<Q", 9)):
        (tmp_path / "x.pth").write_bytes(content)
        refusal(load_transformer, tmp_path / "x.pth")
