"""Find the engine of a graph that fits this machine, and check that this user built it.

An engine is native code, so it is used only if its sha256 is in a build receipt of this user. Receipts are in the
user's own state folder, never beside the engines. An engine and its receipt have the same name,
`<graph>-<key>-<engine sha256>` with shortened hashes, so a receipt fits one engine only. `flexvar build` writes both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...bundle.manifest import ENGINES
from ...bundle.opening import Bundle
from ...checks import require
from ...errors import ArtifactRefused, FlexVARError
from ...files.private import check_private, open_unlinked, read_private, user_folder
from ...files.strict_json import decode, encode, loads
from ...model.tensors import GraphSpec, TensorSpec

log = logging.getLogger(__name__)

RECIPE = "1"  # increased when engines are built in another way that no other part of their key shows
WIDE = "wide"  # name of the profile for sizes without a profile of their own
PORTABLE = "portable"  # target of an engine that runs on several kinds of GPU
RECEIPT_SCHEMA = 1
MAX_RECEIPT_BYTES = 2**20

_BUILD_AGAIN = "Build the engine again with flexvar build."
_SHORT = 12
_STEM = re.compile(r"(?P<graph>[A-Za-z0-9_.-]{1,100})-(?P<key>[0-9a-f]{12})-(?P<sha256>[0-9a-f]{12})")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Sizes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes that an engine is built for: smallest, best and largest of every named axis of the graph's inputs.

    Derived axes (`height_x16`) are left out: they follow from their base.
    """

    name: str
    axes: dict[str, Sizes]

    def __post_init__(self) -> None:
        require(0 < len(self.name) <= 100, "name", self.name, "a name of at most 100 characters")
        for axis, (low, best, high) in self.axes.items():
            require(0 <= low <= best <= high < 2**31, axis, (low, best, high), "smallest ≤ best ≤ largest")

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Whether the profile can run these sizes. Axes that it does not name are ignored."""
        return all(low <= sizes[axis] <= high for axis, (low, _, high) in self.axes.items())

    def shapes(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Smallest, best and largest shape of an input."""
        low, best, high = (tensor.shape({axis: sizes[i] for axis, sizes in self.axes.items()}) for i in range(3))
        return low, best, high


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """The types that a network computes in.

    layers: number of layers by kind ("matmul", "convolution", "attention") and dtype. fused_attention: number of
    attention layers that are one kernel. share: the part of these layers that computes in the claimed dtype.
    """

    claimed: str
    layers: dict[str, dict[str, int]]
    fused_attention: int
    share: float


@dataclass(frozen=True, kw_only=True)
class EngineId:
    """What an engine is built from and for. Engines with equal ids are interchangeable.

    flavour: "tensorrt" or "tensorrt-rtx". version: its version. target: "portable", or compute capabilities joined by
    commas ("8.6,8.9").
    """

    graph: str
    graph_sha256: str
    recipe: str
    flavour: str
    version: str
    target: str
    profiles: tuple[Profile, ...]

    @property
    def key(self) -> str:
        """sha256 over everything that the engine depends on."""
        parts = [self.graph_sha256, self.recipe, self.flavour, self.version, self.target]
        shapes = [sorted(profile.axes.items()) for profile in self.profiles]
        return hashlib.sha256(json.dumps([*parts, shapes], separators=(",", ":")).encode()).hexdigest()

    @property
    def prefix(self) -> str:
        """The first part of the names of its engines."""
        return f"{self.graph}-{self.key[:_SHORT]}-"

    def profile_for(self, sizes: Mapping[str, int]) -> int | None:
        """Index of the first profile for these sizes; None if there is none. The wide profile comes last."""
        return next((i for i, profile in enumerate(self.profiles) if profile.covers(sizes)), None)


@dataclass(frozen=True, kw_only=True)
class Receipt(EngineId):
    """The record that this user built an engine. created: UTC, ISO 8601. size: bytes."""

    schema_version: int
    engine_sha256: str
    size: int
    created: str
    precision: PrecisionReport

    def __post_init__(self) -> None:
        require(self.schema_version == RECEIPT_SCHEMA, "schema_version", self.schema_version, str(RECEIPT_SCHEMA))
        for name in ("graph_sha256", "engine_sha256"):
            require(_SHA256.fullmatch(getattr(self, name)) is not None, name, getattr(self, name), "a sha256")
        require(_STEM.fullmatch(self.stem) is not None, "graph", self.graph, "letters, digits, _ - .")
        require(0 < self.size < 2**50, "size", self.size, "the size of an engine")

    @property
    def stem(self) -> str:
        return f"{self.prefix}{self.engine_sha256[:_SHORT]}"

    @property
    def engine(self) -> str:
        """File name of the engine."""
        return f"{self.stem}.engine"

    def to_bytes(self) -> bytes:
        return (json.dumps(encode(self), sort_keys=True, indent=1) + "\n").encode("ascii")


@dataclass(frozen=True)
class Found:
    """An engine file and its receipt. `read_engine` compares them."""

    path: Path
    receipt: Receipt


def find_engine(
    bundle: Bundle,
    graph: str,
    *,
    flavour: str,
    version: str,
    target: str | None,
    engines_dir: Path | None = None,
    receipts: Path | None = None,
) -> Found:
    """The newest engine of a graph that this user built for this version of the library and this GPU (`target`).

    receipts: the folder of this user's receipts, by default `receipts_folder()`. Reads no engine and writes nothing.
    Raises ArtifactRefused with the reason why no engine fits and the command that builds one.
    """
    folder = engines_folder(bundle, engines_dir)
    built = {"graph_sha256": graph_sha256(bundle, graph), "flavour": flavour, "version": version, "recipe": RECIPE}
    wanted: dict[str, str | None] = {**built, "target": target}
    present = _engine_files(folder, graph)
    known = [r for r in read_receipts(receipts or receipts_folder(), graph) if r.engine in present]
    ranked = sorted(known, key=lambda receipt: (_agreement(receipt, wanted), receipt.created))
    if ranked and _agreement(ranked[-1], wanted) == len(wanted):
        return Found(folder / ranked[-1].engine, ranked[-1])
    raise ArtifactRefused(
        _reason(graph, folder, present, ranked, wanted),
        expected=f"an engine of {graph} that this user built with {flavour} {version} for GPU {target or 'unknown'}",
        fix=f"Run: {build_line(bundle.path, flavour, engines_dir)}",
    )


def read_engine(found: Found) -> bytes:
    """The bytes of an engine. They are read once, and exactly these bytes are checked. Raises ArtifactRefused."""
    receipt = found.receipt
    expected = f"a regular file of {receipt.size} bytes with sha256 {receipt.engine_sha256}"

    def refused(problem: str) -> ArtifactRefused:
        fix = "Delete the file, if it is there, and run flexvar build again."
        return ArtifactRefused(f"The engine {found.path.name} {problem}.", expected=expected, fix=fix)

    try:
        with open_unlinked(found.path) as (file, info):
            if not stat.S_ISREG(info.st_mode):
                raise refused("is no regular file")
            data = file.read(receipt.size + 1)
    except FileNotFoundError as error:
        raise refused("does not exist") from error
    except OSError as error:
        raise refused("is a link" if found.path.is_symlink() else f"cannot be read ({error.strerror})") from error
    if len(data) != receipt.size or hashlib.sha256(data).hexdigest() != receipt.engine_sha256:
        raise refused("was changed after it was built")
    return data


def build_line(bundle: Path, flavour: str, engines_dir: Path | None = None) -> str:
    """The command that builds the missing engines."""
    words = ["flexvar", "build", str(bundle), "--backend", flavour]
    return shlex.join([*words, "--engines", str(engines_dir)] if engines_dir else words)


def engines_folder(bundle: Bundle, engines_dir: Path | None = None) -> Path:
    """The folder of a bundle's engines. It need not exist."""
    return engines_dir if engines_dir is not None else bundle.path / ENGINES


def graph_sha256(bundle: Bundle, graph: str) -> str:
    """One hash of a graph, its weights and its declaration, from the records in the manifest."""
    spec: GraphSpec = bundle.graph(graph)
    records = [[name, bundle.manifest.files[name].sha256] for name in bundle.graph_files(graph)]
    content = json.dumps([bundle.manifest.precision, encode(spec), records], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def receipts_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """The folder of this user's receipts: `$XDG_STATE_HOME/flexvar/receipts`, by default in `~/.local/state`."""
    return user_folder("XDG_STATE_HOME", ".local/state", environ) / "receipts"


def read_receipts(folder: Path, graph: str) -> Iterator[Receipt]:
    """This user's receipts for engines of a graph. Files that are no valid receipts are skipped.

    Raises ArtifactRefused if another user could have written into the folder.
    """
    try:
        check_private(folder)
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        if not _is_of(graph, name, ".json"):
            continue
        try:
            data = read_private(folder / name, MAX_RECEIPT_BYTES)
            receipt = decode(Receipt, loads(data, where=name, fix=_BUILD_AGAIN), where=name, fix=_BUILD_AGAIN)
        except (OSError, FlexVARError) as error:
            log.debug("receipt %s skipped: %s", name, error)
            continue
        if f"{receipt.stem}.json" == name:
            yield receipt


def _engine_files(folder: Path, graph: str) -> set[str]:
    """The names of the engines of a graph in a folder. Only regular files count, so links do not."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        got = f"The folder of engines {folder} cannot be read ({error.strerror})."
        raise ArtifactRefused(got, expected="a readable folder", fix="Check its permissions.") from error
    return {name for name in names if _is_of(graph, name, ".engine")}


def _is_of(graph: str, name: str, suffix: str) -> bool:
    """Whether `name` is a stem of this graph with this suffix."""
    match = _STEM.fullmatch(name.removesuffix(suffix)) if name.endswith(suffix) else None
    return match is not None and match["graph"] == graph


def _agreement(receipt: Receipt, wanted: Mapping[str, str | None]) -> int:
    """The number of wanted properties that a receipt has, counted up to the first that it does not have."""
    for count, (name, value) in enumerate(wanted.items()):
        got = getattr(receipt, name)
        if got != value and not (name == "target" and (got == PORTABLE or value in got.split(","))):
            return count
    return len(wanted)


def _reason(
    graph: str, folder: Path, present: set[str], ranked: list[Receipt], wanted: Mapping[str, str | None]
) -> str:
    """A sentence that says why no engine fits. It is about the engine that comes nearest."""
    if not present:
        links = [path.name for path in folder.glob(f"{graph}-*.engine") if path.is_symlink()]
        return f"The engine {links[0]} is a link." if links else f"There is no engine of {graph} in {folder}."
    if not ranked:
        return f"The engine {min(present)} has no build receipt of this user."
    nearest = ranked[-1]
    name = list(wanted)[_agreement(nearest, wanted)]
    difference = {
        "graph_sha256": "from another export of the graph",
        "flavour": f"with {nearest.flavour}, not {wanted['flavour']}",
        "version": f"with {nearest.flavour} {nearest.version}, not {wanted['version']}",
        "recipe": f"by another version of flexvar-deploy (recipe {nearest.recipe}, not {RECIPE})",
        "target": f"for GPU {nearest.target.replace(',', ' and ')}, not {wanted['target'] or 'an unknown one'}",
    }[name]
    return f"The engine of {graph} was built {difference}."
