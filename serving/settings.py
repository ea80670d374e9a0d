"""The settings of a service, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from flexvar_runtime import ScaleSchedule

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask of the service.

    queue: images that may wait. max_tokens: of all scales of one image; None means 4 times those of the default
    schedule. connections: open at once. json_bytes, edit_bytes: of one body. uploads_bytes: of the bodies of all edits
    being handled. receive_seconds: for a whole request to arrive. send_seconds: after which a connection ends if the
    client reads nothing.
    """

    queue: int = 64
    max_tokens: int | None = None
    connections: int = 2048
    json_bytes: int = 16 * 1024
    edit_bytes: int = 20 * MIB
    uploads_bytes: int = 256 * MIB
    receive_seconds: float = 30.0
    send_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What a worker opens. schedules: those that requests may use; None means any."""

    bundle: Path
    backend: str = "auto"
    engines: Path | None = None
    allow_unproved: bool = False
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[ScaleSchedule, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which workers run. devices: one worker each; `None` for the backend's own choice. threads: of each worker on a
    CPU. in_thread: one worker in a thread of the service, in place of processes."""

    devices: tuple[str | None, ...] = (None,)
    threads: int | None = None
    in_thread: bool = False

    @property
    def workers(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """All settings of a service.

    name: of the model, in the API. keys: API keys; if there are none, no key is asked for. drain_delay: seconds between
    SIGTERM and the end of accepting connections. hang_seconds: a busy worker is replaced if it sends nothing for this
    time and ten times the forecast of its batch.
    """

    model: ModelSettings
    layout: Layout = field(default_factory=Layout)
    limits: Limits = field(default_factory=Limits)
    name: str = "flexvar"
    keys: tuple[str, ...] = ()
    drain_delay: float = 0.0
    hang_seconds: float = 30.0
