"""What the routes of a running service share."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import HTTPError
from ..images.answers import Encoder
from ..images.model import Model
from ..metrics import Metrics
from ..scheduling.dispatcher import Dispatcher
from ..settings import Limits
from .bodies import UploadSpace
from .keys import Keys
from .observing import AccessLog, Record


@dataclass
class Service:
    """What the routes need. model is None until a worker has opened the bundle. draining: the service is stopping."""

    dispatcher: Dispatcher
    metrics: Metrics
    encoder: Encoder
    limits: Limits
    keys: Keys
    uploads: UploadSpace
    access_log: AccessLog
    model: Model | None = None
    draining: bool = False
    opened: float = 0.0

    @property
    def ready(self) -> bool:
        return self.model is not None and not self.draining and self.dispatcher.pool.ready

    def opened_model(self) -> Model:
        """Raises HTTPError before the bundle is open."""
        if self.model is None or self.dispatcher.pool.facts is None:
            raise HTTPError(503, "The model is being opened. Try again in a moment.", "not_ready", retry_after=2)
        return self.model

    def record_refusal(self, record: Record, error: HTTPError) -> None:
        """Write an error to the log line of its request and, if it is for lack of something, to the metrics."""
        record.values["error"] = error.code
        if error.status in (413, 429, 503, 504, 507):
            self.metrics.rejected.labels(error.code).inc()
