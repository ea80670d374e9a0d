"""The manifest of a bundle: the model, its graphs, its defaults, and size and hash of every file.

Every class checks its fields when it is made, so an exporter cannot write a manifest that a reader would refuse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..checks import require, require_file_name, require_match, require_range, short
from ..errors import ArtifactRefused, InvalidInput
from ..files.strict_json import decode, encode, loads
from ..model.facts import ModelFacts
from ..model.guidance import RULES, Guidance
from ..model.precision import Precision
from ..model.sampling import Sampling
from ..model.schedule import ScaleSchedule
from ..model.tensors import NAME, NAME_FORM, GraphSpec

READABLE_VERSIONS = (1, 2, 3)
WITHOUT_HASHES = (1, 2)  # schema versions whose parity record names no files
MANIFEST = "manifest.json"
ENGINES = "engines"  # a folder in a bundle whose files are not in the manifest
UNLISTED = ("model.sig", ".gitattributes")  # files that may lie in a bundle and are never in the manifest
MAX_MANIFEST_BYTES = 16 * 2**20
PSNR = "psnr_db"  # the metric of a parity row that must be at least its bound
METRICS = (PSNR, "relative_error")
_MOST_GRAPHS = 16
PLAIN, PHASES, TRANSPOSED = DECODERS = ("plain", "phases", "transposed")

_EXPORT_AGAIN = "Export the bundle again, or copy the whole bundle again."
_READABLE = "1, 2 or 3"
_BLOCK_PART = re.compile(r"blocks\.([0-9]{1,3})\.(attention|mlp)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SCHEDULE = re.compile(r"[0-9]{1,4}(x[0-9]{1,4})?(_[0-9]{1,4}(x[0-9]{1,4})?)*")
_GREEDY = re.compile(r"upstream|none|[0-9]{1,4}(x[0-9]{1,4})?(,[0-9]{1,4}(x[0-9]{1,4})?)*")


@contextmanager
def _refuse_invalid(field: str) -> Iterator[None]:
    """Turn InvalidInput for the value of a field into ArtifactRefused."""
    try:
        yield
    except InvalidInput as error:
        raise ArtifactRefused(f"{field}: {error.got}", expected=error.expected, fix=_EXPORT_AGAIN) from error


def _parsed(field: str, text: str) -> ScaleSchedule:
    require_match(_SCHEDULE, field, text, "scales such as 1_2_3x5_12x20")
    with _refuse_invalid(field):
        return ScaleSchedule.parse(text)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The values that a request takes where the caller gives none. Raises ArtifactRefused.

    max_side: largest side, in tokens, for which the published rules were made. quality_order: schedules that end like
    the default one, best first, for the choice at a deadline. If it is empty, the order comes from
    `deadlines.choice.quality_order`.
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
        last = _parsed("schedule", self.schedule)[-1]
        require_range("guidance_scale", self.guidance_scale, 0, 1000)
        require(self.guidance_rule in RULES, "guidance_rule", self.guidance_rule, " or ".join(RULES))
        require_range("top_k", self.top_k, 0, 2**20)
        require_range("top_p", self.top_p, 0, 1)
        require_match(_GREEDY, "greedy_scales", self.greedy_scales, "upstream, none or sides such as 7,9")
        require_range("max_side", self.max_side, 1, 1024)
        with _refuse_invalid("guidance"):
            Guidance(self.guidance_scale, self.guidance_rule, self.max_side)
        with _refuse_invalid("sampling"):
            Sampling(self.top_k, self.top_p, self.greedy_scales, self.max_side)
        order = [_parsed("quality_order", text) for text in self.quality_order]
        for one in order:
            require(one[-1] == last, "quality_order", str(one), f"schedules that end like {self.schedule}")
        require(len(set(order)) == len(order), "quality_order", self.quality_order, "schedules that differ")

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the default schedule's images, in tokens."""
        return _parsed("schedule", self.schedule)[-1]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Hashes of the checkpoints that the bundle was made from, and versions of the tools that made it."""

    transformer_sha256: str
    tokenizer_sha256: str
    tools: dict[str, str]

    def __post_init__(self) -> None:
        for field in ("transformer_sha256", "tokenizer_sha256"):
            require_match(_SHA256, field, getattr(self, field), "64 hexadecimal digits, lower case")


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One comparison with the reference. The caller caps metrics that can be infinite (PSNR of equal images)."""

    graph: str
    scale: str | None
    output: str
    metric: str
    value: float
    bound: float

    def __post_init__(self) -> None:
        require(self.metric in METRICS, "metric", self.metric, " or ".join(METRICS))
        for field in ("value", "bound"):
            number = getattr(self, field)
            require(math.isfinite(number) and number >= 0, field, number, "a finite number, not negative")

    @property
    def holds(self) -> bool:
        """Whether the value is within the bound. A PSNR must be at least the bound, an error at most."""
        return self.value >= self.bound if self.metric == PSNR else self.value <= self.bound


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """Agreement with the reference on one backend.

    emulated: whether the backend computed in a wider precision. files: sha256 (hexadecimal) of every file that was
    compared, by name. None in schema versions 1 and 2, and if nothing was compared.
    """

    backend: str
    emulated: bool
    passed: bool
    rows: tuple[ParityRow, ...]
    free_running_agreement: float | None
    files: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.free_running_agreement is not None:
            require_range("free_running_agreement", self.free_running_agreement, 0, 1)
        for name, sha256 in (self.files or {}).items():
            require_file_name("a name in files", name)
            require_match(_SHA256, f"files[{name!r}]", sha256, "64 hexadecimal digits, lower case")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The largest absolute activation in a graph, and the tensor that had it."""

    value: float
    where: str

    def __post_init__(self) -> None:
        require(math.isfinite(self.value) and self.value >= 0, "value", self.value, "a finite number, not negative")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and sha256 (hexadecimal) of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        require_range("size", self.size, 0, 2**50)
        require_match(_SHA256, "sha256", self.sha256, "64 hexadecimal digits, lower case")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`. Raises ArtifactRefused.

    files: empty until the bundle is sealed. float32_parts: parts of the step (`blocks.I.attention`, `blocks.I.mlp`)
    that a bundle in another precision computes in float32, because its parity check failed without them. decoder: form
    of the decoder's upsampling. "plain" is that of the reference, "phases" uses four phases, and "transposed" one
    transposed convolution.
    """

    schema_version: int
    precision: Precision
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
        require(self.schema_version in READABLE_VERSIONS, "schema_version", self.schema_version, _READABLE)
        known = self.schema_version not in WITHOUT_HASHES or self.parity.files is None
        require(known, "parity.files", self.parity.files, "absent in this schema version")
        require(self.precision in set(Precision), "precision", self.precision, f"one of {', '.join(Precision)}")
        object.__setattr__(self, "precision", Precision(self.precision))  # callers may pass a plain string
        require(len(self.graphs) <= _MOST_GRAPHS, "graphs", len(self.graphs), f"at most {_MOST_GRAPHS}")
        for name in self.graphs:
            require_match(NAME, "a name in graphs", name, NAME_FORM)
        for name in self.float32_parts:
            part = _BLOCK_PART.fullmatch(name)
            known = part is not None and int(part[1]) < self.model.depth
            require(known, "float32_parts", name, f"blocks.I.attention or blocks.I.mlp, I < {self.model.depth}")
        parts = self.float32_parts
        require(self.precision is not Precision.FP32 or not parts, "float32_parts", parts, "empty in fp32")
        require(len(set(parts)) == len(parts), "float32_parts", parts, "parts that differ")
        require(self.decoder in DECODERS, "decoder", self.decoder, f"one of {', '.join(DECODERS)}")
        for name in self.largest_activation:
            require(name in self.graphs, "a graph in largest_activation", name, f"one of {', '.join(self.graphs)}")
        for name in self.files:
            require_file_name("a name in files", name)
            reserved = name.split("/")[0].casefold() in (ENGINES, MANIFEST, *UNLISTED)
            require(not reserved, "a name in files", name, f"none of {MANIFEST}, {ENGINES}/, {', '.join(UNLISTED)}")
        folded = {name.casefold() for name in self.files}
        require(len(folded) == len(self.files), "files", sorted(self.files), "names that differ in more than case")

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest in the bytes of `manifest.json`. The schema version is checked first. Raises ArtifactRefused."""
        size = f"The size of {MANIFEST} in bytes"
        require(len(data) <= MAX_MANIFEST_BYTES, size, len(data), f"at most {MAX_MANIFEST_BYTES}")
        document = loads(data, where=MANIFEST, fix=_EXPORT_AGAIN)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if type(version) is not int or version not in READABLE_VERSIONS:
            shown = "no schema version" if version is None else f"schema version {short(version)}"
            raise ArtifactRefused(
                f"{MANIFEST} has {shown}, but this version reads schema version {_READABLE}.",
                expected=_READABLE,
                fix="Upgrade flexvar-deploy, or export the bundle again.",
            )
        manifest = decode(cls, document, where=MANIFEST, fix=_EXPORT_AGAIN)
        for name, graph in manifest.graphs.items():
            require(graph.file in manifest.files, f"{MANIFEST}: graphs[{name!r}].file", graph.file, "a name in files")
        return manifest

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`. Equal manifests give equal bytes."""
        return (json.dumps(encode(self), sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")

    def file_bytes(self, file: str) -> int:
        """Size in bytes of a file and its weight file."""
        return sum(record.size for path, record in self.files.items() if path == file or path.startswith(f"{file}."))
