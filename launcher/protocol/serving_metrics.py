"""Names of a server's metrics that autoscaling, canaries, alerts and dashboards rely on.

A metric that vLLM has too, with the same meaning, has vLLM's name, ``vllm:`` included, and its label ``model_name``:
the model-server protocol of the Gateway API inference extension names these, so an endpoint picker, an autoscaler and a
dashboard need no setting for the engine. Metrics that vLLM does not have begin with ``launcher:``.
"""

from __future__ import annotations

SHARED_PREFIX, OWN_PREFIX = "vllm:", "launcher:"

NUM_RUNNING = f"{SHARED_PREFIX}num_requests_running"
"""Gauge: sequences that engines work on; ``TotalRunningRequests`` in the protocol."""
NUM_WAITING = f"{SHARED_PREFIX}num_requests_waiting"
"""Gauge: sequences that wait for an engine; ``TotalQueuedRequests`` in the protocol."""
KV_CACHE_USAGE = f"{SHARED_PREFIX}kv_cache_usage_perc"
"""Gauge, 0 to 1: share of the KV cache that is used; ``KVCacheUtilization`` in the protocol."""
LORA_INFO = f"{SHARED_PREFIX}lora_requests_info"
"""Gauge: time of the scrape, with the adapters as labels."""
CACHE_CONFIG = f"{SHARED_PREFIX}cache_config_info"
"""Gauge: 1, with ``block_size`` and ``num_gpu_blocks`` of the KV cache as labels."""
TTFT = f"{SHARED_PREFIX}time_to_first_token_seconds"
"""Histogram: from arrival to the first token."""
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
"""Upper bounds of its buckets in seconds, vLLM's; objectives are among them."""

FAILURES = ("error", "timeout", "draining", "abandoned")
"""Values of ``reason`` of ``request_failure_total``; clients left the abandoned ones."""
REJECTIONS = ("queue_full", "rate", "key", "slow", "bodies", "body", "draining", "starting")
"""Usual values of ``reason`` of ``requests_rejected_total``; others name an error of a body."""
