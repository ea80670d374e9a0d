"""Reading of small files that the user names."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactRefused

MOST_BYTES = 2**26


def read_small(path: Path, *, fix: str, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises ArtifactRefused if it cannot be read, or if it has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ArtifactRefused(f"{path} cannot be read: {reason}.", expected="a readable file", fix=fix) from error
    if len(content) > most:
        limit = f"at most {most / 2**20:g} MiB"
        raise ArtifactRefused(f"{path} is too large. It may have {limit}.", expected=limit, fix=fix)
    return content
