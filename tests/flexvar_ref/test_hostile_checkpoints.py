"""Files that ask for more memory or time than they have bytes are refused before anything is allocated.

The address space of the process bounds each test that a fault would fill the memory in: see `little_memory`.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import flexvar_ref
from flexvar_ref import CheckpointError, FlexVAR, Tokenizer
from flexvar_ref.pickles import read_pickle
from flexvar_ref.synthetic import tiny_transformer, transformer_state

Pair = tuple[FlexVAR, Tokenizer]
State = dict[str, torch.Tensor]
GIGABYTES = 1 << 31


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Bounds the address space, so that a fault ends in MemoryError, which no test here accepts."""
    resource = pytest.importorskip("resource", reason="the address space can be bounded on Unix only")
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("/proc does not tell the size of the process")
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def shared_state() -> State:
    return transformer_state(tiny_transformer(depth=1))


@pytest.fixture
def state(shared_state: State) -> State:
    return dict(shared_state)


@pytest.fixture
def refusal(tiny: Pair) -> Callable[[Path], str]:
    def refuse(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            flexvar_ref.load_transformer(path, tiny[1].codebook_VD)
        return caught.value.got

    return refuse


# --- zip archives --------------------------------------------------------------------------------------------------


def rezip(source: Path, target: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))


def _deflate(part: str, size: int) -> Callable[[zipfile.ZipFile, str, bytes], None]:
    def change(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
        if part in name:
            archive.writestr(name, bytes(size) or content, zipfile.ZIP_DEFLATED)
        else:
            archive.writestr(name, content)

    return change


def _twice(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(name, content)
    if name.endswith("data.pkl"):
        archive.writestr(name, content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_deflate("data.pkl", 8 << 20), "data.pkl"),
        (_deflate("data/0", 8 << 20), "data/0"),
        (_deflate("data/", 0), "data/"),
        (_deflate("version", 8 << 20), "version"),
        (_twice, "twice"),
    ],
    ids=["pickle", "storage", "all storages", "version", "an entry twice"],
)
def test_archives_that_unpack_are_refused(
    change: Any, fault: str, state: State, refusal: Callable[[Path], str], tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "good.pth")
    rezip(tmp_path / "good.pth", tmp_path / "bad.pth", change)
    assert fault in refusal(tmp_path / "bad.pth")


def test_an_archive_written_again_without_compression_loads(state: State, tmp_path: Path, tiny: Pair) -> None:
    """Negative control."""
    torch.save(state, tmp_path / "good.pth")
    rezip(tmp_path / "good.pth", tmp_path / "again.pth", lambda archive, name, content: archive.writestr(name, content))
    flexvar_ref.load_transformer(tmp_path / "again.pth", tiny[1].codebook_VD)


# --- strides and shared storages -----------------------------------------------------------------------------------

ROWS = 1 << 19
EXPANDED: dict[str, Callable[[State], State]] = {
    "one element": lambda s: s | {"class_emb.weight": torch.zeros(1).expand(ROWS, s["class_emb.weight"].shape[1])},
    "one row": lambda s: s | {"class_emb.weight": s["class_emb.weight"][:1].expand(ROWS, -1)},
    "overlapping rows": lambda s: s | {"class_emb.weight": torch.zeros(ROWS + 64).as_strided((ROWS, 64), (1, 1))},
    "one element for all": lambda s: {name: torch.zeros(1)[0].expand(value.shape) for name, value in s.items()},
    "one storage for all": lambda s: {name: LONG[: value.numel()].view(value.shape) for name, value in s.items()},
}
LONG = torch.zeros(1 << 17)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("what", EXPANDED)
@pytest.mark.usefixtures("little_memory")
def test_tensors_that_repeat_their_storage_are_refused(
    what: str, zipped: bool, state: State, refusal: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(EXPANDED[what](state), path, _use_new_zipfile_serialization=zipped)
    size = path.stat().st_size
    assert f"has {size} bytes" in refusal(path)


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(1, (4,), (1,)), (0, (2, 3), (3, 1)), (0, (2,), (2**60,)), (2**61, (1,), (1,))]
)
def test_tensors_outside_their_storage_are_refused(
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    state: State,
    refusal: Callable[[Path], str],
    tmp_path: Path,
) -> None:
    """The shape is that of the parameter, the bytes lie behind the storage."""
    rest = {name: value for name, value in state.items() if name != "head.bias"}
    bytes_ = torch.zeros(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=bytes_, dtype=torch.float32, _internal=True)

    class Outside:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {})

    torch.save({**rest, "head.bias": Outside()}, tmp_path / "x.pth")
    assert "head.bias" in refusal(tmp_path / "x.pth")


# --- pickles -------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


def hash_bomb() -> bytes:
    """A tuple of 2**60 parts as the key of a dictionary: hashing it takes forever."""
    return b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"K\x01s."


PICKLES: dict[str, bytes] = {
    "a byte array of 2 GB": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + struct.pack("<q", GIGABYTES)[:5] + b"\x85R.",
    "a tensor of 8 GB": b"\x80\x02ctorch\nFloatTensor\n\x8a\x05" + struct.pack("<q", GIGABYTES)[:5] + b"\x85R.",
    "a byte array that is not there": b"\x80\x05\x96" + struct.pack("<Q", GIGABYTES) + b".",
    "a text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", GIGABYTES) + b".",
    "a memo of 4 billion": b"\x80\x02]r\xff\xff\xff\xff.",
    "tuples in tuples": nested(20_000),
    "a key that is hashed forever": hash_bomb(),
    "an integer of a million digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", PICKLES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.usefixtures("little_memory")
def test_pickles_that_fill_the_memory_are_refused(
    what: str, form: str, refusal: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", PICKLES[what])
            archive.writestr("x/version", "3")
    else:
        head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(head) + PICKLES[what] + pickle.dumps([], 2))
    assert refusal(path).startswith("x.pth ")


def test_endless_pickles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexvar_ref.pickles.MAX_OPCODES", 100)
    with pytest.raises(ValueError, match="more than 100 "):
        read_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 50 + b"N."))


def test_storages_of_a_legacy_file_that_are_not_there(
    state: State, refusal: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for count in (10**12, -1, 0):
        path.write_bytes(content.replace(struct.pack("<q", 512), struct.pack("<q", count)))  # of head.bias
        assert refusal(path).startswith("x.pth ")


# --- safetensors ---------------------------------------------------------------------------------------------------


def with_header(header: str | bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, bytes] = {
    "a length beyond the file": with_header("{}", length=1 << 40),
    "a length of 64 bits": with_header("{}", length=(1 << 64) - 1),
    "a long header": with_header(b"{}" + b" " * (16 << 20)),
    "nested": with_header("[" * 200_000),
    "no JSON": with_header("x" * 64),
    "an offset beyond the file": with_header(json.dumps({"head.bias": tensor([16], 0, 1 << 40)})),
    "overlapping": with_header(json.dumps({"head.bias": tensor([16], 0, 64), "pos_1LC": tensor([16], 0, 64)})),
    "a name twice": with_header(f'{{"a":{json.dumps(tensor([8], 0, 32))},"a":{json.dumps(tensor([8], 32, 64))}}}'),
    "a shape that overflows": with_header(json.dumps({"head.bias": tensor([1 << 62, 1 << 62], 0, 64)})),
    "a shape without elements": with_header(json.dumps({"head.bias": tensor([0, 1 << 60], 0, 0)}), b""),
    "negative": with_header(json.dumps({"head.bias": tensor([-1], 0, 64)})),
    "empty": b"",
}


@pytest.mark.parametrize("what", HEADERS)
@pytest.mark.usefixtures("little_memory")
def test_headers_are_refused(what: str, refusal: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(HEADERS[what])
    assert refusal(tmp_path / "x.safetensors").startswith("x.safetensors ")


# --- JSON beside a checkpoint --------------------------------------------------------------------------------------

DEEP = "[" * 200_000
CONFIGS: dict[str, Any] = {
    "deep": DEEP,
    "deep in a setting": lambda good: json.dumps(good)[:-1] + ', "depth": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "twice": lambda good: json.dumps(good)[:-1] + ', "depth": 1}',
    "no UTF-8": b"\xff\xfe{}",
    "long": " " * (2 << 20) + "{}",
    "an integer of many digits": lambda good: json.dumps(good)[:-1] + ', "x": ' + "9" * 10_000 + "}",
    **{
        f"{name} {value}": {name: value}
        for name in ("depth", "heads", "head_size", "mlp_ratio", "classes", "vocabulary", "code_dim", "position_side")
        for value in (10**30, 10**9, -1)
    },
    "depth of the limit": {"depth": 256},
    "true": {"depth": True},
    "null": {"classes": None},
    "text": {"drop_path": "much"},
    "NaN": {"drop_path": float("nan")},
    "infinity": {"label_dropout": float("inf")},
    "list": {"heads": [[[]]]},
}


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.usefixtures("little_memory")
def test_configs_beside_a_checkpoint_are_refused(
    what: str, tiny: Pair, refusal: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    flexvar_ref.save(tiny[0], path)
    change, good = CONFIGS[what], json.loads(path.with_suffix(".json").read_text())
    text = json.dumps({**good, **change}) if isinstance(change, dict) else change(good) if callable(change) else change
    path.with_suffix(".json").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr("flexvar_ref.checkpoint.FlexVAR", None)  # no module is built
    assert "t.json" in refusal(path) or "t.safetensors" in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        {"multipliers": [1] * 10**5},
        {"multipliers": [10**9]},
        {"encoder_blocks": 10**9},
        {"groups": 10**30},
        {"channels": 0.5},
    ],
)
def test_configs_of_a_tokenizer_are_refused(change: dict[str, Any], tiny: Pair, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    flexvar_ref.save(tiny[1], path)
    good = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**good, **change}))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        flexvar_ref.load_tokenizer(path)


@pytest.mark.parametrize(
    "text", [DEEP, '{"weight_map": ' + '{"a":' * 100_000, '{"weight_map": {"a": "b", "a": "c"}}', "\0"]
)
def test_indices_are_refused(text: str, refusal: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    assert "m.safetensors.index.json" in refusal(path)


def test_state_with_more_blocks_than_it_holds(state: State, refusal: Callable[[Path], str], tmp_path: Path) -> None:
    for name in ("blocks.99999999999999999999.ffn.fc1.bias", f"blocks.{'9' * 400}.ffn.fc1.bias"):
        save_file({**state, name: torch.zeros(1)}, tmp_path / "s.safetensors")
        assert "s.safetensors" in refusal(tmp_path / "s.safetensors")
