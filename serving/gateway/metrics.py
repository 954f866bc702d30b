"""Figures for Prometheus, by route and adapter. What clients can invent never becomes a label, and labels have an end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

Replicas = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Deployment → replica → what it told last."""

_LATENCY = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_MOST_LABELS = 2000
"""Pairs of route and adapter; later ones are counted together as `other`. A histogram of one has a dozen series."""

OTHER = "other"


class Metrics:
    """One registry for each gateway process: nothing global, so that tests and several applications do not share one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        by = ("route", "adapter")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"adaptory_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"adaptory_{name}", text, by, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests for an answer, by HTTP status.", *by, "status")
        self.refused = counter("refused", "Requests that led nowhere: no valid key, no valid body.", "status", "code")
        self.errors = counter("errors", "Requests that failed, by our code of the error.", *by, "code")
        self.fallbacks = counter("fallbacks", "Requests that a route's fallback answered.", *by)
        self.tokens_in = counter("prompt_tokens", "Tokens of prompts.", *by)
        self.tokens_cached = counter("cached_prompt_tokens", "Of those, tokens that were not computed again.", *by)
        self.tokens_out = counter("completion_tokens", "Tokens of answers.", *by)
        self.first_token = histogram("first_token_seconds", "From the request to the first token.", _LATENCY)
        self.between_tokens = histogram(
            "between_tokens_seconds", "From one piece of a streamed answer to the next.", _BETWEEN
        )
        self.duration = histogram("request_seconds", "From the request to the end of its answer.", _LATENCY)
        self.in_flight = Gauge("adaptory_in_flight", "Requests being answered.", registry=self.registry)
        self.routes_version = Gauge(
            "adaptory_routes_version", "Version of the routes in force.", registry=self.registry
        )
        self._known: set[tuple[str, str]] = set()

    @property
    def running(self) -> int:
        """Requests being answered."""
        return int(self.registry.get_sample_value("adaptory_in_flight") or 0)

    def labels(self, route: str | None, adapter: str | None) -> tuple[str, str]:
        """
        Args:
            route: a name that was resolved; None where none was.
            adapter: digest; None: the base.
        """
        pair = (route or "", adapter.removeprefix("sha256:")[:12] if adapter else "")
        if pair not in self._known:
            if len(self._known) >= _MOST_LABELS:
                return OTHER, OTHER
            self._known.add(pair)
        return pair

    def text(self, replicas: Replicas) -> bytes:
        return generate_latest(self.registry) + generate_latest(_Engines(replicas))


class _Engines:
    """What the replicas told, as gauges. They are as few as replicas; those that are gone are not shown any more."""

    def __init__(self, replicas: Replicas):
        self._replicas = replicas

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (part, key, text) in _ENGINE.items():
            family = GaugeMetricFamily(f"adaptory_engine_{name}", text, labels=("deployment", "replica"))
            for deployment, replicas in self._replicas.items():
                for replica, told in replicas.items():
                    if part in told:
                        family.add_metric((deployment, replica), float(told[part][key]))
            yield family


_ENGINE = {
    "running": ("stats", "running", "Requests in the batch."),
    "waiting": ("stats", "waiting", "Requests that wait for a place in the batch."),
    "waiting_tokens": ("stats", "waiting_tokens", "Tokens of prompts that are still to be read."),
    "cache_tokens": ("stats", "cache_tokens", "Capacity of the key-value cache."),
    "cache_tokens_used": ("stats", "cache_tokens_used", "Tokens of it that running requests hold."),
    "prompt_tokens": ("stats", "prompt_tokens", "Tokens of prompts since the start."),
    "shared_tokens": ("stats", "shared_tokens", "Of those: found in the cache."),
    "completion_tokens": ("stats", "completion_tokens", "Tokens of answers since the start."),
    "preemptions": ("stats", "preemptions", "Requests that lost their place for a while, since the start."),
    "steps": ("stats", "steps", "Steps since the start."),
    "step_seconds": ("stats", "step_seconds", "Spent in them."),
    "failed_steps": ("stats", "failed_steps", "Of those: failed."),
    "adapter_hits": ("cache", "engine_hits", "Requests whose adapter was in the engine, since the start."),
    "cold_loads": ("cache", "cold", "Requests that waited for their adapter to be loaded, since the start."),
    "cold_seconds": ("cache", "cold_seconds", "That they waited, together."),
    "refused_adapters": ("cache", "refused_loads", "Adapters found unfit, since the start."),
    "failed_loads": ("cache", "failed_loads", "Loads that failed otherwise, since the start."),
    "adapter_bytes": ("cache", "memory_bytes", "Of adapters in memory."),
}
"""Name → where it stands in what a replica tells (`serving.replica.EngineReplica.residency`), and what it is."""
