"""What `/metrics` tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_PATHS = ("/v1/vision", "/v1/chat/completions")


class Metrics:
    """Counters of one worker, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        where = {"registry": self.registry}
        self.requests = Counter("lorgnette_requests", "Questions, by answer; 499: hung up", ["path", "status"], **where)
        spans = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 25, 30)
        self.seconds = Histogram(
            "lorgnette_request_seconds", "From a question's head to its answer", ["path"], buckets=spans, **where
        )
        rows = (1, 2, 4, 8, 16, 32, 64)
        self.rows = Histogram("lorgnette_batch_rows", "Questions in a batch", ["adapter"], buckets=rows, **where)
        self.tokens = Counter("lorgnette_generated_tokens", "Tokens of answers", ["adapter"], **where)
        self.waiting = Gauge("lorgnette_waiting", "Questions that no batch has taken yet", **where)
        self.inside = Gauge("lorgnette_inside", "Questions that are being answered, or wait", **where)

    def answered(self, path: str, status: int, seconds: float) -> None:
        path = path if path in _PATHS else "other"  # whoever asks for made-up paths makes no new series
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
