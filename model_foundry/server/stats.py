"""What the server has done so far: for people in /stats, for Prometheus in /metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
WINDOW_SECONDS = 60.0
_MOST_IN_WINDOW = 100_000


class Stats:
    """Counts. Labels are route templates, methods, statuses and served names, so their number is bounded."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._recent: deque[float] = deque(maxlen=_MOST_IN_WINDOW)
        self.total_requests = self.failed_requests = 0
        self.prompt_tokens = self.completion_tokens = 0
        self._total_seconds = 0.0
        self.registry = CollectorRegistry()
        labels = ["route", "method", "status"]
        self._requests = Counter("foundry_requests", "Requests answered", labels, registry=self.registry)
        self._latency = Histogram(
            "foundry_request_seconds",
            "Time to the end of the answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            "foundry_first_token_seconds", "Time to the first text", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter("foundry_tokens", "Tokens read and written", ["model", "kind"], registry=self.registry)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def answered(self, *, route: str, method: str, status: int, seconds: float, counts: bool) -> None:
        """A request is over; `counts` for those that /stats is about."""
        self._requests.labels(route, method, str(status)).inc()
        self._latency.labels(route).observe(seconds)
        if counts:
            self.total_requests += 1
            self.failed_requests += status >= 400
            self._total_seconds += seconds
            self._recent.append(self._clock())

    def first_text(self, model: str, seconds: float) -> None:
        self._first.labels(model).observe(seconds)

    def generated(self, model: str, *, prompt_tokens: int, completion_tokens: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self._tokens.labels(model, "prompt").inc(prompt_tokens)
        self._tokens.labels(model, "completion").inc(completion_tokens)

    @property
    def average_latency(self) -> float:
        """Seconds."""
        return self._total_seconds / self.total_requests if self.total_requests else 0.0

    def as_dict(self) -> dict[str, Any]:
        now = self._clock()
        while self._recent and self._recent[0] < now - WINDOW_SECONDS:
            self._recent.popleft()
        return {
            "total_requests": self.total_requests,
            "failed_requests": self.failed_requests,
            "average_latency": round(self.average_latency, 6),
            "requests_per_minute": len(self._recent),
            "uptime": round(now - self._started, 3),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
