"""The manifest of a bundle: what the model is, what its graphs take and give, and what every file must be.

Every class checks itself on construction, so an exporter cannot write what a reader would refuse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ArtifactRefused, InvalidInput
from .schedule import ScaleSchedule
from .strict_json import decode, encode, loads, short

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
JOINED_MODULATION = (1,)  # versions whose graphs pass the modulation of all blocks as one tensor
MANIFEST = "manifest.json"
ENGINES = "engines"  # at the top of a bundle, outside the manifest
MAX_MANIFEST_BYTES = 16 * 2**20

DTYPES = ("float32", "float16", "bfloat16", "int32", "int64")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-bf16")
GUIDANCE_RULES = ("ramp", "constant")
PLAIN, PHASES, TRANSPOSED = DECODERS = ("plain", "phases", "transposed")

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_GRAPH_NAME = re.compile(_PART)
_FILE_NAME = re.compile(f"{_PART}(/{_PART})*")
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLOCK_PART = re.compile(r"blocks\.([0-9]{1,3})\.(attention|mlp)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEDULE = re.compile(r"[0-9]{1,4}(x[0-9]{1,4})?(_[0-9]{1,4}(x[0-9]{1,4})?)*")
_GREEDY = re.compile(r"upstream|none|[0-9]{1,4}(x[0-9]{1,4})?(,[0-9]{1,4}(x[0-9]{1,4})?)*")


def _require(ok: bool, field: str, value: object, expected: str) -> None:
    if not ok:
        raise ArtifactRefused(f"{field} = {short(value)}", expected=expected, fix="export the bundle again")


def _require_range(field: str, value: float, low: float, high: float) -> None:
    _require(low <= value <= high, field, value, f"{low} to {high}")


def _require_match(pattern: re.Pattern[str], field: str, value: str, expected: str) -> None:
    _require(len(value) <= 1000 and pattern.fullmatch(value) is not None, field, value, expected)


def _parsed(field: str, text: str) -> ScaleSchedule:
    _require_match(_SCHEDULE, field, text, "scales as in 1_2_3x5_12x20")
    try:
        return ScaleSchedule.parse(text)
    except InvalidInput as error:
        raise ArtifactRefused(
            f"{field}: {error.got}", expected=error.expected, fix="export the bundle again"
        ) from error


def _require_file_name(field: str, name: str) -> None:
    expected = "a plain relative name inside the bundle: parts of letters, digits, _ - . joined by /"
    _require_match(_FILE_NAME, field, name, expected)
    _require(len(name) <= 200, field, name, "a name of at most 200 characters")
    _require(name != MANIFEST and name.split("/")[0] != ENGINES, field, name, f"neither {MANIFEST} nor {ENGINES}/")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output: an axis is a size, or a name when it is dynamic."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]

    def __post_init__(self) -> None:
        _require_match(_GRAPH_NAME, "name", self.name, "letters, digits, _ - .")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        for axis in self.axes:
            ok = 0 < axis < 2**31 if isinstance(axis, int) else _AXIS.fullmatch(axis) is not None
            _require(ok, "axes", self.axes, "positive sizes, or names that are identifiers")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape, given the sizes of named axes (`height_x16` is 16 times `height`)."""
        named = {axis: axis.partition("_x") for axis in self.axes if isinstance(axis, str)}
        lengths = {axis: sizes[base] * int(factor or 1) for axis, (base, _, factor) in named.items()}
        return tuple(axis if isinstance(axis, int) else lengths[axis] for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _require_file_name("file", self.file)
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        _require(len(set(names)) == len(names), "inputs and outputs", names, "every tensor name once")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of the transformer and the tokenizer. `class_names` are in label order, `null_class` means "no class".

    `downsampling`: pixels per token side; `value_range`: what the decoder's output means, black to white;
    `position_side`: side of the learned position table, in tokens.
    """

    depth: int
    width: int
    heads: int
    head_size: int
    classes: int
    class_names: tuple[str, ...] | None
    null_class: int
    vocabulary: int
    code_dim: int
    downsampling: int
    value_range: tuple[float, float]
    position_side: int

    def __post_init__(self) -> None:
        _require_range("depth", self.depth, 1, 256)
        _require_range("heads", self.heads, 1, 1024)
        _require_range("head_size", self.head_size, 1, 1024)
        _require(self.width == self.heads * self.head_size, "width", self.width, "heads times head_size")
        _require_range("classes", self.classes, 1, 2**20)
        named = self.classes if self.class_names is None else len(self.class_names)
        _require(named == self.classes, "class_names of length", named, f"one name for each of {self.classes} classes")
        _require_range("null_class", self.null_class, 0, self.classes)
        _require_range("vocabulary", self.vocabulary, 1, 2**20)
        _require_range("code_dim", self.code_dim, 1, 2**14)
        power_of_two = 1 <= self.downsampling <= 64 and self.downsampling & (self.downsampling - 1) == 0
        _require(power_of_two, "downsampling", self.downsampling, "a power of two up to 64")
        low, high = self.value_range
        _require(-1e4 <= low < high <= 1e4, "value_range", self.value_range, "low < high, within ±10000")
        _require_range("position_side", self.position_side, 1, 1024)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What `None` means in a request. `max_side`: largest side, in tokens, at which the published rules still hold.

    quality_order: schedules to the size of the default one, best first, among which a deadline chooses; where there are
    none, and in manifests without the key, `deadline.quality_order` has a rule.
    """

    schedule: str
    guidance_scale: float
    guidance_rule: str
    top_k: int
    top_p: float
    greedy_scales: str
    max_side: int
    quality_order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_match(_SCHEDULE, "schedule", self.schedule, "scales as in 1_2_3x5_12x20")
        _require_range("guidance_scale", self.guidance_scale, 0, 1000)
        _require(self.guidance_rule in GUIDANCE_RULES, "guidance_rule", self.guidance_rule, " or ".join(GUIDANCE_RULES))
        _require_range("top_k", self.top_k, 0, 2**20)
        _require_range("top_p", self.top_p, 0, 1)
        _require_match(_GREEDY, "greedy_scales", self.greedy_scales, "upstream, none or sides as in 7,9")
        _require_range("max_side", self.max_side, 1, 1024)
        if self.quality_order:
            last = _parsed("schedule", self.schedule)[-1]
            order = [_parsed("quality_order", text) for text in self.quality_order]
            for schedule in order:
                _require(
                    schedule[-1] == last, "quality_order", str(schedule), f"schedules that end like {self.schedule}"
                )
            _require(len(set(order)) == len(order), "quality_order", self.quality_order, "every schedule once")

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) tokens of the images that the default schedule makes."""
        return _parsed("schedule", self.schedule)[-1]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The checkpoints the bundle was made from, and the versions of the tools that made it."""

    transformer_sha256: str
    tokenizer_sha256: str
    tools: dict[str, str]

    def __post_init__(self) -> None:
        for field in ("transformer_sha256", "tokenizer_sha256"):
            _require_match(_SHA256, field, getattr(self, field), "64 hexadecimal digits, lower case")


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One comparison with the reference. A metric that can be infinite (PSNR of equal images) is recorded capped."""

    graph: str
    scale: str | None
    output: str
    metric: str
    value: float
    bound: float

    def __post_init__(self) -> None:
        _require(math.isfinite(self.value), "value", self.value, "a finite number: cap the metric before recording it")
        _require(math.isfinite(self.bound), "bound", self.bound, "a finite number")


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """Agreement with the reference on one backend; `emulated` where that backend widened the precision."""

    backend: str
    emulated: bool
    passed: bool
    rows: tuple[ParityRow, ...]
    free_running_agreement: float | None

    def __post_init__(self) -> None:
        if self.free_running_agreement is not None:
            _require_range("free_running_agreement", self.free_running_agreement, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Range:
    """The largest absolute activation seen in a graph, and the tensor it was seen in."""

    value: float
    where: str

    def __post_init__(self) -> None:
        _require(math.isfinite(self.value) and self.value >= 0, "value", self.value, "a finite number, not negative")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        _require_range("size", self.size, 0, 2**50)
        _require_match(_SHA256, "sha256", self.sha256, "64 hexadecimal digits, lower case")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything `manifest.json` says. `files` is empty until the bundle is sealed.

    float32_parts: parts of the step that a bundle in another precision computes in float32 (`blocks.I.attention`,
    `blocks.I.mlp`), because the gate asked for it; manifests without the key have none.
    decoder: how the decoder doubles a map and convolves it, as the reference does, in four phases or in one transposed
    convolution; without the key plain.
    """

    schema_version: int
    precision: str
    model: ModelFacts
    graphs: dict[str, GraphSpec]
    defaults: Defaults
    provenance: Provenance
    parity: ParityRecord
    largest_activation: dict[str, Range]
    files: dict[str, FileRecord]
    float32_parts: tuple[str, ...] = ()
    decoder: str = PLAIN

    def __post_init__(self) -> None:
        readable = " or ".join(map(str, READABLE_VERSIONS))
        _require(self.schema_version in READABLE_VERSIONS, "schema_version", self.schema_version, readable)
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        for name in self.graphs:
            _require_match(_GRAPH_NAME, "graphs: name", name, "letters, digits, _ - .")
        for name in self.float32_parts:
            part = _BLOCK_PART.fullmatch(name)
            known = part is not None and int(part[1]) < self.model.depth
            _require(known, "float32_parts", name, f"blocks.I.attention or blocks.I.mlp, I < {self.model.depth}")
        parts = self.float32_parts
        _require(self.precision != "fp32" or not parts, "float32_parts", parts, "none in fp32")
        _require(len(set(parts)) == len(parts), "float32_parts", parts, "every part once")
        _require(self.decoder in DECODERS, "decoder", self.decoder, ", ".join(DECODERS))
        for name in self.largest_activation:
            _require(name in self.graphs, "largest_activation: graph", name, f"one of {', '.join(self.graphs)}")
        for name in self.files:
            _require_file_name("files: name", name)
        folded = {name.casefold() for name in self.files}
        _require(len(folded) == len(self.files), "files", sorted(self.files), "names that differ in more than case")

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse `manifest.json`; the schema version is looked at first. Raises ArtifactRefused."""
        _require(len(data) <= MAX_MANIFEST_BYTES, f"{MANIFEST}: bytes", len(data), f"at most {MAX_MANIFEST_BYTES}")
        document = loads(data, where=MANIFEST)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or version not in READABLE_VERSIONS:
            raise ArtifactRefused(
                f"{MANIFEST}: no schema version" if version is None else f"{MANIFEST}: schema version {short(version)}",
                expected=" or ".join(map(str, READABLE_VERSIONS)),
                fix="upgrade flexvar-deploy or export again",
            )
        manifest = decode(cls, document, where=MANIFEST)
        for name, graph in manifest.graphs.items():
            _require(graph.file in manifest.files, f"{MANIFEST}: graphs[{name!r}].file", graph.file, "a name in files")
        return manifest

    def to_bytes(self) -> bytes:
        """Stable: equal manifests give equal bytes."""
        return (json.dumps(encode(self), sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")
