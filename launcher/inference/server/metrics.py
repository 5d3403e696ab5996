"""Prometheus metrics of a server; those that vLLM has too have vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.server.request_state import RequestState
from launcher.protocol.serving_metrics import (
    CACHE_CONFIG,
    FAILURES,
    KV_CACHE_USAGE,
    LORA_INFO,
    NUM_RUNNING,
    NUM_WAITING,
    OWN_PREFIX,
    REJECTIONS,
    SHARED_PREFIX,
    TTFT,
    TTFT_BUCKETS,
)

if TYPE_CHECKING:
    from launcher.inference.server.replica_pool import ReplicaPool
    from launcher.inference.server.result_cache import ResultCache

_SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class ServerMetrics:
    """Counters and histograms of one server.

    Args:
        pool: its engines, whose state is read at every scrape.
        results: its cache of results.
        model: name of the base model.
        adapters: names of the adapters beside it.
    """

    def __init__(self, pool: ReplicaPool, results: ResultCache, *, model: str, adapters: Collection[str] = ()) -> None:
        self._registry = CollectorRegistry()
        self._model, self._state = model, _StateCollector(pool, results, model=model, adapters=adapters)
        self._registry.register(self._state)
        name = f"{SHARED_PREFIX}request_success"
        self._finished = self._counter(
            name, "Sequences that ended with a result, by finish reason", "model_name", "finished_reason"
        )
        name = f"{OWN_PREFIX}request_failure"
        self._failed = self._counter(name, "Sequences that failed, by reason", "reason")
        name = f"{OWN_PREFIX}requests_rejected"
        self._rejected = self._counter(name, "Requests that were rejected, by reason", "reason")
        # The first event is an increase for Prometheus only where the counter was 0 before.
        for counter, values in ((self._failed, FAILURES), (self._rejected, REJECTIONS)):
            for value in values:
                counter.labels(value)
        for reason in ("stop", "length"):
            self._finished.labels(model, reason)
        name = f"{SHARED_PREFIX}prompt_tokens"
        self._prompt_tokens = self._counter(name, "Prompt tokens given to engines", "model_name").labels(model)
        name = f"{OWN_PREFIX}requests_by_model"
        self._by_model = self._counter(name, "Sequences that ended, by model or adapter", "model_name")
        name = f"{OWN_PREFIX}generation_tokens_by_model"
        self._tokens_by_model = self._counter(name, "Tokens of sequences that ended, by model or adapter", "model_name")
        self._times = {kind: self._histogram(name, what, buckets) for kind, (name, what, buckets) in _TIMES.items()}
        self.num_ended = 0
        self._sums = dict.fromkeys(("ttft", "itl", "e2el"), (0, 0.0))

    def count_ended(self, state: RequestState) -> None:
        """Count a sequence that has ended."""
        self.num_ended += 1
        if state.finish_reason is not None:
            self._finished.labels(self._model, state.finish_reason).inc()
        else:
            self._failed.labels(state.error_reason).inc()
        self._count_model(state)
        if state.num_attempts:
            self._prompt_tokens.inc(len(state.request.prompt))
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
            self._finished.labels(self._model, state.finish_reason).inc()
            self._count_model(state)

    def count_rejected(self, reason: str) -> None:
        """Count a request that was rejected."""
        self._rejected.labels(reason).inc()

    def render(self) -> bytes:
        """Return everything as Prometheus reads it."""
        page: bytes = generate_latest(self._registry)
        return page

    def row(self) -> dict[str, float]:
        """Return a line of metrics.jsonl; times are means since the last line."""
        values = {metric.name.partition(":")[2]: metric.samples[0].value for metric in self._state.numbers()}
        values["prompt_tokens"] = next(iter(self._prompt_tokens.collect())).samples[0].value
        names = {"ttft": "time_to_first_token_s", "itl": "inter_token_latency_s", "e2el": "e2e_request_latency_s"}
        for kind, (count, total) in self._sums.items():
            if count:
                values[names[kind]] = total / count
            self._sums[kind] = (0, 0.0)
        return {f"serve/{name}": float(value) for name, value in values.items()}

    def _count_model(self, state: RequestState) -> None:
        name = state.request.adapter or self._model
        self._by_model.labels(name).inc()
        self._tokens_by_model.labels(name).inc(len(state.tokens))

    def _observe(self, kind: str, seconds: float) -> None:
        self._times[kind].observe(seconds)
        if kind in self._sums:
            count, total = self._sums[kind]
            self._sums[kind] = (count + 1, total + seconds)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, ("model_name",), buckets=buckets, registry=self._registry).labels(self._model)


_TIMES: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "ttft": (TTFT, "From arrival to the first token", TTFT_BUCKETS),
    "itl": (f"{SHARED_PREFIX}inter_token_latency_seconds", "From one token of a sequence to the next", _SHORT_BUCKETS),
    "e2el": (f"{SHARED_PREFIX}e2e_request_latency_seconds", "From arrival to the last token", _LONG_BUCKETS),
    "queue": (
        f"{SHARED_PREFIX}request_queue_time_seconds",
        "From arrival to the first output of the engine",
        _LONG_BUCKETS,
    ),
    "prefill": (f"{SHARED_PREFIX}request_prefill_time_seconds", "From there to the first token", _LONG_BUCKETS),
    "decode": (f"{SHARED_PREFIX}request_decode_time_seconds", "From the first token to the last", _LONG_BUCKETS),
}


class _StateCollector(Collector):
    """State of engines and cache at the time of a scrape."""

    def __init__(self, pool: ReplicaPool, results: ResultCache, *, model: str, adapters: Collection[str]) -> None:
        self._pool, self._results, self._model, self._adapters = pool, results, model, adapters

    def collect(self) -> Iterator[Metric]:
        """Yield every number, then the adapters and the size of the KV cache, which are labels."""
        yield from self.numbers()
        if self._adapters:
            # Every engine holds all adapters, so each is ready and no request waits for one.
            names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
            info = GaugeMetricFamily(LORA_INFO, "Adapters that are loaded; the value is the time", labels=names)
            info.add_metric((str(len(self._adapters)), ",".join(self._adapters), ""), time.time())
            yield info
        if blocks := sum(each.kv_cache_capacity for each in self._pool.stats()) // BLOCK_SIZE:
            names = ("model_name", "block_size", "num_gpu_blocks")
            info = GaugeMetricFamily(CACHE_CONFIG, "Blocks of the KV cache, of all engines", labels=names)
            info.add_metric((self._model, str(BLOCK_SIZE), str(blocks)), 1.0)
            yield info

    def numbers(self) -> Iterator[Metric]:
        """Yield every number; each has one sample."""
        now, totals, results = self._pool.stats(), self._pool.totals(), self._results
        running, waiting = sum(s.running for s in now), sum(s.waiting for s in now) + self._pool.num_waiting
        used, capacity = sum(s.kv_cache_tokens for s in now), sum(s.kv_cache_capacity for s in now)
        gauges = {
            NUM_RUNNING: ("Sequences that engines work on", running),
            NUM_WAITING: ("Sequences that wait for an engine", waiting),
            KV_CACHE_USAGE: ("Share of the KV cache that is used", used / capacity if capacity else 0.0),
            f"{OWN_PREFIX}kv_cache_tokens": ("Tokens whose keys and values are cached", used),
            f"{OWN_PREFIX}engines_ready": ("Engines that accept requests", self._pool.ready),
            f"{OWN_PREFIX}result_cache_size": ("Cached results", len(results)),
            f"{OWN_PREFIX}result_cache_bytes": ("Bytes of cached results", results.bytes),
            f"{OWN_PREFIX}result_cache_max_bytes": ("Bytes that cached results may take", results.max_bytes),
        }
        for name, (what, value) in gauges.items():
            yield self._sample(GaugeMetricFamily, name, what, value)
        counters = {
            f"{SHARED_PREFIX}generation_tokens": ("Tokens that engines generated", totals.generated_tokens_total),
            f"{SHARED_PREFIX}prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache",
                totals.prefix_query_tokens_total,
            ),
            f"{SHARED_PREFIX}prefix_cache_hits": (
                "Prompt tokens found in the prefix cache",
                totals.prefix_hit_tokens_total,
            ),
            f"{OWN_PREFIX}engine_steps": ("Steps of all engines", totals.steps_total),
            f"{OWN_PREFIX}padding_tokens": ("Padding positions that were computed", totals.padding_tokens_total),
            f"{SHARED_PREFIX}num_preemptions": (
                "Sequences put back into the queue because the KV cache was full",
                totals.preemptions_total,
            ),
            f"{SHARED_PREFIX}spec_decode_num_drafts": ("Drafts of speculative decoding", totals.drafts_total),
            f"{SHARED_PREFIX}spec_decode_num_draft_tokens": ("Drafted tokens", totals.draft_tokens_total),
            f"{SHARED_PREFIX}spec_decode_num_accepted_tokens": (
                "Drafted tokens that were accepted",
                totals.accepted_tokens_total,
            ),
            f"{OWN_PREFIX}decoded_tokens": (
                "Tokens of answers after the first, where engines may draft",
                totals.decoded_tokens_total,
            ),
            f"{OWN_PREFIX}decoding_passes": (
                "Passes through all layers, one after the other, that those took",
                totals.decoding_passes_total,
            ),
            f"{OWN_PREFIX}engine_restarts": ("Engines restarted", self._pool.restarts),
            f"{OWN_PREFIX}result_cache_hits": ("Sequences whose result was cached", results.hits),
            f"{OWN_PREFIX}result_cache_shared": ("Sequences that joined an equal one in flight", results.shared),
            f"{OWN_PREFIX}result_cache_misses": ("Sequences that were computed and could be cached", results.misses),
        }
        for name, (what, value) in counters.items():
            yield self._sample(CounterMetricFamily, name, what, value)

    def _sample(
        self, family: type[GaugeMetricFamily | CounterMetricFamily], name: str, what: str, value: float
    ) -> Metric:
        if not name.startswith(SHARED_PREFIX):
            return family(name, what, value=value)
        found = family(name, what, labels=("model_name",))
        found.add_metric((self._model,), value)
        return found
