"""Layouts that training tools write: wrappers, prefixes, averaged weights, shards. The advice of refusals works."""

from __future__ import annotations

import argparse
import datetime
import decimal
import enum
import functools
import json
import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import flexvar_ref
from flexvar_ref import CheckpointError, FlexVAR, Tokenizer
from flexvar_ref.errors import InvalidInput
from flexvar_ref.synthetic import TINY_TOKENIZER, tiny_transformer, tokenizer_state, transformer_state

Pair = tuple[FlexVAR, Tokenizer]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return transformer_state(tiny_transformer(depth=1))


@pytest.fixture(scope="module")
def other() -> State:
    return transformer_state(tiny_transformer(depth=1), seed=1)


@pytest.fixture(scope="module")
def vae() -> State:
    return tokenizer_state(TINY_TOKENIZER)


@pytest.fixture
def load(tmp_path: Path, tiny: Pair) -> Callable[..., FlexVAR]:
    """(content or path, weights) -> the transformer. A content is written as x.pth first."""

    def read(content: Any, weights: str | None = None) -> FlexVAR:
        path = content
        if not isinstance(content, Path):
            path = tmp_path / "x.pth"
            torch.save(content, path)
        return flexvar_ref.load_transformer(path, tiny[1].codebook_VD, weights=weights)

    return read


def holds(model: FlexVAR, state: State) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    for old, new in pairs:
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "Lightning": lambda s: {"state_dict": s, "epoch": 1, "callbacks": {"last": None}, "lr_schedulers": [{"step": 3}]},
    "Lightning with the attribute's name": lambda s: {"state_dict": prefixed(s, "net.")},
    "DeepSpeed": lambda s: {"module": s, "ds_config": {"x": [1]}},
    "nested": lambda s: {"model": {"module": {"state_dict": s}}},
    "data parallel in a wrapper": lambda s: {"state_dict": prefixed(s, "model.module.")},
    "each block compiled": lambda s: renamed(s, ("blocks.0.", "blocks.0._orig_mod.")),
    "parts of a block compiled": lambda s: renamed(s, (".attn.", ".attn._orig_mod."), ("head.", "head._orig_mod.")),
    "compiled and parallel": lambda s: prefixed(renamed(s, ("blocks.0.", "blocks.0._orig_mod.")), "_orig_mod.module."),
    "a number and a text beside": lambda s: {**s, "epoch": 3, "name": "d1", "best": 0.5, "seen": torch.tensor(7)},
    "the optimiser beside": lambda s: {**s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "groups": [1]}},
    "the optimiser by name": lambda s: {"model": s, "optim": {n: {"exp_avg": torch.ones(2)} for n in s}},
    "averages of the optimiser": lambda s: {"model": s, "optimizer": {"exp_avg": renamed(s), "exp_avg_sq": renamed(s)}},
    "a loss beside": lambda s: {**s, "loss": torch.tensor([0.5])},
    "under an unknown name": lambda s: {"generator": s},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load(layout: str, state: State, load: Callable[..., FlexVAR]) -> None:
    assert holds(load(LAYOUTS[layout](state)), state)


class Colour(enum.Enum):
    RED = 1


class Options:
    """A class of the training program."""

    def __init__(self) -> None:
        self.values = {"lr": 1e-4}


BESIDE: dict[str, Any] = {
    "dates": {"at": datetime.datetime(2026, 1, 1), "for": datetime.timedelta(1), "zone": datetime.UTC},
    "standard classes": {"id": uuid.UUID(int=1), "share": decimal.Decimal("0.1"), "colour": Colour.RED},
    "a function of arguments": functools.partial(print, 1),
    "a class of the program": Options(),
    "the optimiser as an object": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
    "options": argparse.Namespace(out=Path("runs"), nested=argparse.Namespace(when=datetime.date(2026, 1, 1))),
    "a tuple as key": {(1, 2): "x", "y": {3: datetime.date(2026, 1, 1)}},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("beside", BESIDE)
def test_values_of_other_classes_are_ignored(
    beside: str, protocol: int, state: State, load: Callable[..., FlexVAR], tmp_path: Path
) -> None:
    torch.save({"trainer": {"var_wo_ddp": state}, "args": BESIDE[beside]}, tmp_path / "y.pth", pickle_protocol=protocol)
    assert holds(load(tmp_path / "y.pth"), state)


# --- averaged weights ----------------------------------------------------------------------------------------------

AVERAGED: dict[str, Callable[[State, State], Any]] = {
    "two wrappers": lambda m, e: {"model": m, "ema": e},
    "timm": lambda m, e: {"state_dict": m, "state_dict_ema": e},
    "nested": lambda m, e: {"trainer": {"var_wo_ddp": m, "var_ema": {"module": e}}},
    "prefixes": lambda m, e: {"state_dict": {**prefixed(m, "model."), **prefixed(e, "model_ema.")}},
    "bare": lambda m, e: {**m, "ema": e},
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_with_both_a_choice_is_required(layout: str, state: State, other: State, load: Callable[..., FlexVAR]) -> None:
    content = AVERAGED[layout](state, other)
    with pytest.raises(CheckpointError, match=r"--weights ema .* --weights model"):
        load(content)
    assert holds(load(content, "model"), state)
    assert holds(load(content, "ema"), other)


@pytest.mark.parametrize("place", ["ema", "model_ema", "averaged_model", "state_dict"])
def test_one_set_loads_and_is_named(
    place: str, state: State, load: Callable[..., FlexVAR], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flexvar_ref"):
        assert holds(load({place: state}), state)
    assert place in caplog.text and "x.pth" in caplog.text


def test_weights_that_are_absent_or_unknown_are_refused(state: State, load: Callable[..., FlexVAR]) -> None:
    with pytest.raises(CheckpointError, match="no ema weights"):
        load({"model": state}, "ema")
    with pytest.raises(CheckpointError, match="no model weights"):
        load({"ema": state}, "model")
    with pytest.raises(InvalidInput, match="'best'"):
        load({"model": state}, "best")


def test_two_sets_of_one_sort_are_refused(state: State, other: State, load: Callable[..., FlexVAR]) -> None:
    with pytest.raises(CheckpointError, match=r"first .*second"):
        load({"first": state, "second": other})


def test_the_choice_serves_both_files(tmp_path: Path, state: State, other: State, vae: State) -> None:
    """A file that holds one set is read whatever the choice is, if the other file holds the chosen weights."""
    for name, content in {"t": {"model": state, "ema": other}, "one": {"model": state}, "v": {"model": vae}}.items():
        torch.save(content, tmp_path / f"{name}.pth")
    assert holds(flexvar_ref.load(tmp_path / "t.pth", tmp_path / "v.pth", weights="ema")[0], other)
    with pytest.raises(CheckpointError, match=r"no ema weights in v\.pth and one\.pth"):
        flexvar_ref.load(tmp_path / "one.pth", tmp_path / "v.pth", weights="ema")


# --- safetensors ---------------------------------------------------------------------------------------------------


def write_shards(state: State, folder: Path, stem: str = "model", count: int = 3) -> Path:
    """A sharded checkpoint. Returns its index."""
    folder.mkdir(exist_ok=True)
    names, weight_map = sorted(state), {}
    for shard in range(count):
        file = f"{stem}-{shard + 1:05}-of-{count:05}.safetensors"
        part = {name: state[name] for name in names[shard::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_published_names_as_safetensors(
    prefix: str, state: State, load: Callable[..., FlexVAR], tmp_path: Path
) -> None:
    save_file(prefixed(state, prefix), tmp_path / "s.safetensors")
    assert holds(load(tmp_path / "s.safetensors"), state)


def test_a_tokenizer_as_safetensors(vae: State, tmp_path: Path, tiny: Pair) -> None:
    save_file(vae, tmp_path / "v.safetensors")
    own = flexvar_ref.load_tokenizer(tmp_path / "v.safetensors").state_dict()
    assert all(torch.equal(own[name], value) for name, value in tiny[1].state_dict().items())


def test_a_sharded_checkpoint_by_its_index_or_its_folder(
    state: State, load: Callable[..., FlexVAR], tmp_path: Path
) -> None:
    index = write_shards(state, tmp_path / "sharded")
    assert holds(load(index), state)
    assert holds(load(index.parent), state)
    shutil.copy(write_shards(prefixed(state, "module."), tmp_path / "other", "m", 2), tmp_path / "other" / "config.txt")
    assert holds(load(tmp_path / "other"), state)


def test_a_folder_of_several_checkpoints_names_a_path_that_loads(
    state: State, vae: State, load: Callable[..., FlexVAR], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    save_file(vae, tmp_path / "tokenizer.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    named = caught.value.fix.removesuffix(".").rpartition(" ")[2]
    assert holds(load(Path(named)), state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is a folder"):
        load(tmp_path / "empty")


def _drop(index: Path, document: dict[str, Any]) -> None:
    next(index.parent.glob("*2-of-*.safetensors")).unlink()


def _list(index: Path, document: dict[str, Any]) -> None:
    document["weight_map"]["pos_1LC.more"] = min(document["weight_map"].values())


def _outside(index: Path, document: dict[str, Any]) -> None:
    document["weight_map"]["pos_1LC"] = "../model.safetensors"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_drop, "00002-of-00003"),
        (_list, "pos_1LC.more"),
        (_outside, "pos_1LC"),
        (lambda i, d: d.update(weight_map={"a": 3}), "shard of a"),
        (lambda i, d: d.update(weight_map=[]), "weight_map"),
        (lambda i, d: d["weight_map"].pop("head.bias"), "Missing: head.bias"),
    ],
)
def test_wrong_indices_are_refused(
    change: Any, fault: str, state: State, load: Callable[..., FlexVAR], tmp_path: Path
) -> None:
    index = write_shards(state, tmp_path / "sharded")
    document = json.loads(index.read_text())
    change(index, document)
    index.write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        load(index)
    assert fault in caught.value.got


# --- advice --------------------------------------------------------------------------------------------------------


def test_the_json_of_another_tool_can_be_moved_away(state: State, load: Callable[..., FlexVAR], tmp_path: Path) -> None:
    save_file(state, tmp_path / "s.safetensors")
    (tmp_path / "s.json").write_text('{"architectures": ["FlexVAR"]}')
    with pytest.raises(CheckpointError, match=r"move it away"):
        load(tmp_path / "s.safetensors")
    (tmp_path / "s.json").rename(tmp_path / "moved.txt")
    assert holds(load(tmp_path / "s.safetensors"), state)


def test_a_saved_model_is_refused_and_its_state_loads(tiny: Pair, load: Callable[..., FlexVAR]) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\)"):
        load(tiny[0])
    assert load(tiny[0].state_dict())


def test_strided_weights_load_after_contiguous(state: State, load: Callable[..., FlexVAR]) -> None:
    wide = {**state, "head.weight": state["head.weight"].t().contiguous().t()}  # stored by columns
    assert holds(load(wide), state)
    expanded = {**state, "pos_1LC": torch.zeros(1).expand(state["pos_1LC"].shape)}
    with pytest.raises(CheckpointError, match=r"tensor\.contiguous\(\)"):
        load(expanded)
    load({**expanded, "pos_1LC": expanded["pos_1LC"].contiguous()})


# --- VAR -----------------------------------------------------------------------------------------------------------


def var_transformer(state: State) -> State:
    return {**state, "lvl_embed.weight": torch.zeros(10, 64), "pos_1LC": torch.zeros(1, 680, 64)}


def var_tokenizer() -> State:
    names = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
    return {
        **{name: torch.zeros(160, 3, 3, 3) for name in names},
        "quantize.embedding.weight": torch.zeros(4096, 32),
        "quantize.ema_vocab_hit_SV": torch.zeros(10, 4096),
        "quantize.quant_resi.qresi_ls.0.weight": torch.zeros(32, 32, 3, 3),
        "quant_conv.weight": torch.zeros(32, 32, 3, 3),
    }


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"trainer": {"var_wo_ddp": s}}, lambda s: {"model": s}])
def test_checkpoints_of_var_are_refused_by_name(wrap: Any, state: State, tmp_path: Path, tiny: Pair) -> None:
    for name, content in {"var_d16": var_transformer(state), "vae_ch160v4096z32": var_tokenizer()}.items():
        path = tmp_path / f"{name}.pth"
        torch.save(wrap(content), path)
        for load in (lambda p: flexvar_ref.load_transformer(p, tiny[1].codebook_VD), flexvar_ref.load_tokenizer):
            with pytest.raises(CheckpointError, match=rf"{name}\.pth is a checkpoint of VAR"):
                load(path)
