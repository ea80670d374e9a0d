"""Whether a bundle is proved: whether its parity record says that these very files agree with the reference.

The record is no signature. Whoever changes a bundle can also change its record.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ..errors import ArtifactRefused
from ..model.signatures import PREFILL
from .manifest import MANIFEST, WITHOUT_HASHES, Manifest

CARD = "README.md"  # text for people, which no graph and no part of the runtime reads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificate:
    """Whether a bundle is proved, and if not, why.

    problem: a sentence that says why the bundle is not proved, None if it is proved. refused: whether the runtime opens
    the bundle only if the caller allows unproved bundles. A bundle of an old schema version that passed is not refused.
    """

    problem: str | None
    refused: bool

    @property
    def proved(self) -> bool:
        return self.problem is None

    def to_json(self) -> dict[str, bool | str | None]:
        return {"proved": self.proved, "unproved_because": self.problem}

    @classmethod
    def of(cls, manifest: Manifest) -> Certificate:
        problem = _failure(manifest)
        if problem is None and manifest.schema_version in WITHOUT_HASHES:
            version = manifest.schema_version
            return cls(f"The parity record of a bundle of schema version {version} does not name its files.", False)
        problem = problem or _difference(manifest)
        return cls(problem, problem is not None)


def compared_files(manifest: Manifest) -> dict[str, str]:
    """Name and sha256 of the files that a parity record of this bundle must name: all but the card."""
    return {name: record.sha256 for name, record in manifest.files.items() if name != CARD}


def check_certificate(manifest: Manifest, *, allow_unproved: bool) -> None:
    """Raise ArtifactRefused if a bundle is not proved. Only warn if `allow_unproved`, or if its schema is older."""
    certificate = Certificate.of(manifest)
    if certificate.problem is None:
        return
    if certificate.refused and not allow_unproved:
        raise ArtifactRefused(
            certificate.problem,
            expected="a bundle whose files agree with the reference",
            fix="Export the bundle again. To use it all the same, pass --allow-unproved (Python: allow_unproved=True).",
        )
    advice = "Its images may be wrong." if certificate.refused else "Export the bundle again."
    log.warning("%s %s", certificate.problem, advice)


def _failure(manifest: Manifest) -> str | None:
    """Why the comparison with the reference did not pass, None if it passed."""
    record = manifest.parity
    if not record.rows:
        return "The bundle was never compared with the reference."
    for row in record.rows:
        if not row.holds:
            place = f"{row.graph}, {row.scale}" if row.scale else row.graph
            return (
                f"The bundle does not agree with the reference: {row.metric:.40} of {row.output:.40} ({place:.80}) is "
                f"{row.value:.3g}, but its bound is {row.bound:g}."
            )
    if not record.passed:
        return f"The {MANIFEST} says that the bundle does not agree with the reference."
    compared = {row.graph for row in record.rows}
    for graph in manifest.graphs:
        if graph not in compared and graph != PREFILL:  # not compared if the default schedule has few scales
            return f"The graph {graph} was never compared with the reference."
    return None


def _difference(manifest: Manifest) -> str | None:
    """Why the files that were compared are not the files of the bundle, None if they are."""
    compared, present = manifest.parity.files or {}, compared_files(manifest)
    for name in sorted(compared.keys() | present.keys()):
        if name not in compared:
            return f"{name} was never compared with the reference."
        if name not in present:
            return f"The parity record names {name}, which is not a file of the bundle."
        if compared[name] != present[name]:
            return f"{name} is not the file that was compared with the reference."
    return None
