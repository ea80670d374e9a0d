"""How much memory is left, and how much a generation needs: refuse before the system has to."""

from __future__ import annotations

from pathlib import Path

from .errors import OutOfMemory
from .manifest import ModelFacts
from .schedule import ScaleSchedule

DECODER_MAPS = 6  # feature maps of the decoder alive at once at full size, measured with a margin
DECODER_CHANNELS = 128


def available_bytes() -> int | None:
    """Memory this process may still take (Linux: the kernel's estimate, within its control group), else None."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit set
    return max(min(limits), 0)


def loop_bytes(model: ModelFacts, schedule: ScaleSchedule, images: int, guided: bool, kv_itemsize: int) -> int:
    """Bytes of the buffers of the scale loop: keys and values of all scales, logits and inputs of the largest."""
    sequences = images * (2 if guided else 1)
    kv = 2 * schedule.tokens * model.depth * sequences * model.width * kv_itemsize
    logits = images * schedule.largest * model.vocabulary * 4
    inputs = sequences * schedule.largest * (model.width + model.code_dim) * 4
    return kv + logits + inputs


def decode_bytes(model: ModelFacts, size: tuple[int, int]) -> int:
    """Estimated working memory of decoding one (h, w) token map."""
    h, w = size
    return DECODER_MAPS * h * w * model.downsampling**2 * DECODER_CHANNELS * 4


def require(needed: int, available: int | None, what: str, fix: str) -> None:
    """Raise OutOfMemory where `needed` bytes are more than are left."""
    if available is not None and needed > available:
        raise OutOfMemory(
            f"{what} that needs {needed / 2**30:.1f} GiB", expected=f"at most {available / 2**30:.1f} GiB", fix=fix
        )
