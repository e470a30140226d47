"""Prometheus metrics of the worker."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_PATHS = ("/v1/vision", "/v1/chat/completions")


class Metrics:
    """Counters of one worker, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        where = {"registry": self.registry}
        self.requests = Counter("lorgnette_requests", "Requests; status 499: disconnected", ["path", "status"], **where)
        spans = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30)
        self.seconds = Histogram(
            "lorgnette_request_seconds", "Seconds from headers to answer", ["path"], buckets=spans, **where
        )
        rows = (1, 2, 4, 8, 16, 32, 64)
        self.rows = Histogram("lorgnette_batch_rows", "Requests in a batch", ["adapter"], buckets=rows, **where)
        self.tokens = Counter("lorgnette_generated_tokens", "Tokens of answers", ["adapter"], **where)
        self.waiting = Gauge("lorgnette_waiting", "Requests that wait for a batch", **where)
        self.in_progress = Gauge("lorgnette_inside", "Requests in progress, waiting ones included", **where)

    def answered(self, path: str, status: int, seconds: float) -> None:
        path = path if path in _PATHS else "other"  # unknown paths create no new time series
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
