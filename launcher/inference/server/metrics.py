"""Prometheus metrics under vLLM's names with the prefix ``launcher:``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.inference.server.request_state import RequestState

if TYPE_CHECKING:
    from launcher.inference.server.replica_pool import ReplicaPool
    from launcher.inference.server.result_cache import ResultCache

_PREFIX = "launcher:"
_SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class ServerMetrics:
    """Counters and histograms of one server.

    Args:
        pool: its engines, whose state is read at every scrape.
        results: its cache of results.
        model: name of the base model.
    """

    def __init__(self, pool: ReplicaPool, results: ResultCache, *, model: str) -> None:
        self._registry = CollectorRegistry()
        self._pool, self._results = pool, results
        self._registry.register(_StateCollector(pool, results))
        self.finished = self._counter(
            "request_success", "Sequences that ended with a result, by finish reason", "finished_reason"
        )
        self.failed = self._counter("request_failure", "Sequences that failed, by reason", "reason")
        self.rejected = self._counter("requests_rejected", "Requests that were rejected, by reason", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens given to engines")
        self._model = model
        self.by_model = self._counter("requests_by_model", "Sequences that ended, by model or adapter", "model_name")
        self.tokens_by_model = self._counter(
            "generation_tokens_by_model", "Tokens of sequences that ended, by model or adapter", "model_name"
        )
        self._times = {
            "ttft": self._histogram("time_to_first_token_seconds", "From arrival to the first token", _SHORT_BUCKETS),
            "itl": self._histogram(
                "inter_token_latency_seconds", "From one token of a sequence to the next", _SHORT_BUCKETS
            ),
            "e2el": self._histogram("e2e_request_latency_seconds", "From arrival to the last token", _LONG_BUCKETS),
            "queue": self._histogram(
                "request_queue_time_seconds", "From arrival to the first output of the engine", _LONG_BUCKETS
            ),
            "prefill": self._histogram("request_prefill_time_seconds", "From there to the first token", _LONG_BUCKETS),
            "decode": self._histogram("request_decode_time_seconds", "From the first token to the last", _LONG_BUCKETS),
        }
        self.num_ended = 0
        self._sums = dict.fromkeys(("ttft", "itl", "e2el"), (0, 0.0))

    def count_ended(self, state: RequestState) -> None:
        """Count a sequence that has ended."""
        self.num_ended += 1
        if state.finish_reason is not None:
            self.finished.labels(state.finish_reason).inc()
        else:
            self.failed.labels(state.error_reason).inc()
        self._count_model(state)
        if state.num_attempts:
            self.prompt_tokens.inc(len(state.request.prompt))
        times = state.times
        for itl_s in state.itl_s:
            self._observe("itl", itl_s)
        if times.started is None or times.first_token is None or times.ended is None:
            return
        self._observe("ttft", times.first_token - times.arrived)
        self._observe("e2el", times.ended - times.arrived)
        self._observe("queue", times.started - times.arrived)
        self._observe("prefill", times.first_token - times.started)
        self._observe("decode", times.ended - times.first_token)

    def count_shared(self, state: RequestState) -> None:
        """Count a sequence that was answered by a cached or shared result."""
        if state.finish_reason is not None:
            self.finished.labels(state.finish_reason).inc()
            self._count_model(state)

    def render(self) -> bytes:
        """Return everything as Prometheus reads it."""
        page: bytes = generate_latest(self._registry)
        return page

    def row(self) -> dict[str, float]:
        """Return a line of metrics.jsonl; times are means since the last line."""
        values = {metric.name.removeprefix(_PREFIX): sum(s.value for s in metric.samples) for metric in self._state()}
        values["prompt_tokens"] = _value(self.prompt_tokens)
        names = {"ttft": "time_to_first_token_s", "itl": "inter_token_latency_s", "e2el": "e2e_request_latency_s"}
        for kind, (count, total) in self._sums.items():
            if count:
                values[names[kind]] = total / count
            self._sums[kind] = (0, 0.0)
        return {f"serve/{name}": float(value) for name, value in values.items()}

    def _count_model(self, state: RequestState) -> None:
        name = state.request.adapter or self._model
        self.by_model.labels(name).inc()
        self.tokens_by_model.labels(name).inc(len(state.tokens))

    def _state(self) -> Iterator[Metric]:
        yield from _StateCollector(self._pool, self._results).collect()

    def _observe(self, kind: str, seconds: float) -> None:
        self._times[kind].observe(seconds)
        if kind in self._sums:
            count, total = self._sums[kind]
            self._sums[kind] = (count + 1, total + seconds)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", what, buckets=buckets, registry=self._registry)


class _StateCollector(Collector):
    """State of engines and cache at the time of a scrape."""

    def __init__(self, pool: ReplicaPool, results: ResultCache) -> None:
        self._pool, self._results = pool, results

    def collect(self) -> Iterator[Metric]:
        """Yield every number."""
        now, totals, results = self._pool.stats(), self._pool.totals(), self._results
        running, waiting = sum(s.running for s in now), sum(s.waiting for s in now) + self._pool.num_waiting
        used, capacity = sum(s.kv_cache_tokens for s in now), sum(s.kv_cache_capacity for s in now)
        gauges = {
            "num_requests_running": ("Sequences that engines work on", running),
            "num_requests_waiting": ("Sequences that wait for an engine", waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache that is used",
                used / capacity if capacity else 0.0,
            ),
            "kv_cache_tokens": ("Tokens whose keys and values are cached", used),
            "engines_ready": ("Engines that accept requests", self._pool.ready),
            "result_cache_size": ("Cached results", len(results)),
            "result_cache_bytes": ("Bytes of cached results", results.bytes),
            "result_cache_max_bytes": ("Bytes that cached results may take", results.max_bytes),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"{_PREFIX}{name}", what, value=value)
        counters = {
            "generation_tokens": ("Tokens that engines generated", totals.generated_tokens_total),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", totals.prefix_query_tokens_total),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache", totals.prefix_hit_tokens_total),
            "engine_steps": ("Steps of all engines", totals.steps_total),
            "padding_tokens": ("Padding positions that were computed", totals.padding_tokens_total),
            "num_preemptions": (
                "Sequences put back into the queue because the KV cache was full",
                totals.preemptions_total,
            ),
            "engine_restarts": ("Engines restarted", self._pool.restarts),
            "result_cache_hits": ("Sequences whose result was cached", results.hits),
            "result_cache_shared": ("Sequences that joined an equal one in flight", results.shared),
            "result_cache_misses": ("Sequences that were computed and could be cached", results.misses),
        }
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"{_PREFIX}{name}", what, value=value)


def _value(counter: Counter) -> float:
    return float(next(iter(counter.collect())).samples[0].value)
