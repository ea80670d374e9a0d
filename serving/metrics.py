"""The metrics of a service, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flexvar_runtime import __version__

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms, all named `flexvar_...`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(
            name: str, text: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = _SECONDS
        ) -> Histogram:
            return Histogram(f"flexvar_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = Counter("flexvar_requests", "Requests", ("route", "method", "status"), registry=registry)
        self.request = histogram("request_seconds", "Time from the request to the end of its answer", ("route",))
        self.queue = histogram("queue_seconds", "Time that a request waited for a worker")
        self.generation = histogram("generation_seconds", "Time of a batch in a worker, with the decoder")
        self.decode = histogram("decode_seconds", "Time of a batch in the decoder, where the worker runs it on its own")
        self.encode = histogram("encode_seconds", "Time to write the images of a request as PNG, JPEG or WebP")
        self.batch = histogram("batch_images", "Images that ran at once", buckets=_IMAGES)
        self.lag = histogram("loop_lag_seconds", "Delay of the event loop, measured twice a second")
        self.queued = Gauge("flexvar_queue_images", "Images that wait", registry=registry)
        self.cancelled = Counter("flexvar_cancelled", "Requests whose client went away", ("stage",), registry=registry)
        self.rejected = Counter(
            "flexvar_rejected",
            "Requests refused for lack of room, time, memory or workers",
            ("reason",),
            registry=registry,
        )
        self.restarts = Counter("flexvar_worker_restarts", "Workers that ended and were replaced", registry=registry)
        self.build = Gauge(
            "flexvar_build_info",
            "1, with the version of flexvar and what it serves",
            ("version", "bundle", "backend", "precision"),
            registry=registry,
        )

    def describe(self, bundle: str, backend: str, precision: str) -> None:
        self.build.labels(__version__, bundle, backend, precision).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
