"""What a server did, for Prometheus; each server has a registry of its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rankonce.serving.exchanges import Exchange, note_stage
from rankonce.serving.observations import (
    SECONDS,
    SHARES,
    TOKENS,
    CacheObserved,
    PassObserved,
    QueueObserved,
    Refusal,
    Stage,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class EngineState(NamedTuple):
    """How to ask an engine what it holds now.

    Attributes:
        model: whose engine it is.
        queue: what is under way.
        caches: what each cache did and holds, by the cache's name.
    """

    model: str
    queue: Callable[[], QueueObserved]
    caches: Callable[[], Mapping[str, CacheObserved]]


class Metrics:
    """Counts questions, and everything that the engine reports."""

    def __init__(self, *, version: str, models: Sequence[str]) -> None:
        self.registry = CollectorRegistry()
        self._states: list[EngineState] = []
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        registry = self.registry
        info = Gauge("rankonce_info", "1; what runs.", ["version", "model"], registry=registry)
        for model in models:
            info.labels(version, model).set(1)
        self.ready = Gauge("rankonce_ready", "1 while /ready answers 200.", registry=registry)
        self.in_flight = Gauge(
            "rankonce_requests_in_flight", "Questions that are being answered.", registry=registry
        )
        self._requests = Counter(
            "rankonce_requests",
            "Questions answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rankonce_request_seconds",
            "From the head of a question to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._errors = Counter(
            "rankonce_errors",
            "Questions that failed by the server's fault.",
            ["code"],
            registry=registry,
        )
        self._refusals = Counter(
            "rankonce_refusals", "Questions that were not computed.", ["reason"], registry=registry
        )
        self._owner_requests = Counter(
            "rankonce_key_requests", "Questions of an API key.", ["key"], registry=registry
        )
        self._owner_tokens = Counter(
            "rankonce_key_tokens", "Prompt tokens of an API key.", ["key"], registry=registry
        )
        self._stages = Histogram(
            "rankonce_stage_seconds",
            "Time that questions spend in a stage.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        for stage in Stage:
            self._stages.labels(stage.value)
        for refusal in Refusal:
            self._refusals.labels(refusal.value)
        self._add_passes()

    def _add_passes(self) -> None:
        registry = self.registry
        self._pass_tokens = Histogram(
            "rankonce_pass_tokens", "Computed tokens of a pass.", buckets=TOKENS, registry=registry
        )
        self._packing = Histogram(
            "rankonce_pass_packing_ratio",
            "Useful tokens of a pass over what it may hold.",
            buckets=SHARES,
            registry=registry,
        )
        self._pass_seconds = Histogram(
            "rankonce_pass_seconds", "Time of a pass.", buckets=SECONDS, registry=registry
        )
        self._candidates = Counter("rankonce_candidates", "Candidates scored.", registry=registry)
        self._tokens = Counter(
            "rankonce_tokens",
            "Tokens of passes: computed, or from the prefix cache.",
            ["source"],
            registry=registry,
        )
        for source in ("computed", "cached"):
            self._tokens.labels(source)

    def watch(self, state: EngineState) -> None:
        """Ask an engine for its queue and caches whenever the metrics are read."""
        if not self._states:
            self.registry.register(_StateCollector(self._states))
        self._states.append(state)

    def on_stage(self, stage: Stage, seconds: float) -> None:
        """Count the seconds that one question spent in a stage, and note them on the question."""
        self._stages.labels(stage.value).observe(seconds)
        note_stage(stage, seconds)

    def on_pass(self, seen: PassObserved) -> None:
        """Count a pass."""
        self._pass_tokens.observe(seen.computed_tokens)
        self._packing.observe(seen.efficiency)
        self._pass_seconds.observe(seen.seconds)
        self._candidates.inc(seen.num_candidates)
        self._tokens.labels("computed").inc(seen.computed_tokens)
        self._tokens.labels("cached").inc(seen.cached_tokens)

    def on_refusal(self, reason: Refusal) -> None:
        """Count a question that the engine does not compute."""
        self._refusals.labels(reason.value).inc()

    def on_turned_away(self, reason: str) -> None:
        """Count a question that never reaches the engine: no key, too many, too slow, too late."""
        self._refusals.labels(reason).inc()

    def on_answer(self, exchange: Exchange, *, status: int, seconds: float) -> None:
        """Count a question that is answered."""
        self._requests.labels(exchange.method, exchange.route, str(status)).inc()
        self._seconds.labels(exchange.route).observe(seconds)
        # Overload and draining are no faults; they are among the refusals.
        if status >= 500 and status != 503:
            self._errors.labels(exchange.code or "crash").inc()
        if exchange.owner:
            self._owner_requests.labels(exchange.owner).inc()
            self._owner_tokens.labels(exchange.owner).inc(exchange.num_tokens or 0)

    def write(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


_QUEUE = {
    "open": ("num_open", "Questions admitted and not answered."),
    "waiting": ("num_waiting", "Requests that wait for a pass or its rest."),
    "waiting_tokens": ("waiting_tokens", "Their tokens, not computed yet."),
}
_CACHE_COUNTERS = {
    "hits": "Look-ups that found something.",
    "misses": "Look-ups that found nothing.",
    "hit_tokens": "Tokens found.",
    "asked_tokens": "Tokens looked for.",
    "evictions": "Entries that went to make room.",
}
_CACHE_GAUGES = {
    "bytes": ("num_bytes", "Held now."),
    "max_bytes": ("max_bytes", "Bound of what is held."),
    "entries": ("num_entries", "Held now."),
}


class _StateCollector(Collector):
    """Reads what the engines hold at the moment of asking."""

    def __init__(self, states: Sequence[EngineState]) -> None:
        self._states = states

    def collect(self) -> Iterable[Metric]:
        queues = {state.model: state.queue() for state in self._states}
        for suffix, (field, text) in _QUEUE.items():
            gauge = GaugeMetricFamily(f"rankonce_queue_{suffix}", text, labels=["model"])
            for model, queue in queues.items():
                gauge.add_metric([model], getattr(queue, field))
            yield gauge
        caches = [
            ([state.model, name], cache)
            for state in self._states
            for name, cache in state.caches().items()
        ]
        labels = ["model", "cache"]
        for field, text in _CACHE_COUNTERS.items():
            counter = CounterMetricFamily(f"rankonce_cache_{field}", text, labels=labels)
            for place, cache in caches:
                counter.add_metric(place, getattr(cache, field))
            yield counter
        for suffix, (field, text) in _CACHE_GAUGES.items():
            gauge = GaugeMetricFamily(f"rankonce_cache_{suffix}", text, labels=labels)
            for place, cache in caches:
                gauge.add_metric(place, getattr(cache, field))
            yield gauge
