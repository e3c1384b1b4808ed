"""What a model server tells Prometheus: requests, seconds per video, queue, version, looks at the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600)
CLIENT_GONE = 499  # as nginx has it: nobody reads the answer
# By status; else error.
OUTCOMES = {200: "ok", 400: "bad_request", 413: "too_large", 415: "bad_request", CLIENT_GONE: "gone", 503: "busy"}
LOOKS = ("switched", "unchanged", "refused", "unreachable")


class Metrics:
    """Of one server; `queue` gives the number of requests that run or wait."""

    def __init__(self, queue: Callable[[], int]) -> None:
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram

        self.kind = CONTENT_TYPE_LATEST  # of `text`
        self._all = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._all}
        self._requests = Counter("qvgen_requests", "Requests for videos, by outcome", ["outcome"], **own)
        self._seconds = Histogram("qvgen_video_seconds", "Time that a video took, without waiting", buckets=SECONDS, **own)
        self._looks = Counter("qvgen_registry_looks", "Looks at the registry, by what came of them", ["outcome"], **own)
        self._version = Gauge("qvgen_model_version", "The version that serves", ["model"], **own)
        Gauge("qvgen_queue", "Requests that run or wait for their turn", **own).set_function(queue)
        for outcome in {*OUTCOMES.values(), "error"}:
            self._requests.labels(outcome)  # there from the start, at 0
        for outcome in LOOKS:
            self._looks.labels(outcome)

    def request(self, status: int) -> str:
        """Count one; returns its outcome."""
        outcome = OUTCOMES.get(status, "error")
        self._requests.labels(outcome).inc()
        return outcome

    def video(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def look(self, outcome: str, model: str, version: int) -> None:
        """What came of a look at the registry, and the version that serves after it."""
        self._looks.labels(outcome).inc()
        self._version.labels(model).set(version)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        from prometheus_client import generate_latest

        return generate_latest(self._all)
