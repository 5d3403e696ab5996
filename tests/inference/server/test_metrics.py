"""The page of metrics: names, types and labels that other programs rely on."""

from __future__ import annotations

import time

from prometheus_client.parser import text_string_to_metric_families

from launcher.inference.engine.base import EngineStats
from launcher.inference.engine.block_manager import BLOCK_SIZE
from launcher.inference.server.metrics import ServerMetrics
from launcher.inference.server.result_cache import ResultCache
from launcher.inference.tokenizer import byte_tokenizer
from launcher.protocol.serving_metrics import (
    CACHE_CONFIG,
    KV_CACHE_USAGE,
    LORA_INFO,
    NUM_RUNNING,
    NUM_WAITING,
    TTFT,
    TTFT_BUCKETS,
)
from tests.inference.server.in_process import MODEL, in_process
from tests.inference.server.test_adapters import ADAPTERS, Recording, body


def test_an_endpoint_picker_finds_what_its_protocol_names() -> None:
    """Names and types of the model-server protocol of the Gateway API inference extension, with vLLM's labels."""
    with in_process(Recording(), byte_tokenizer(), adapters=ADAPTERS) as served:
        served.post("/v1/completions", body("polite"))
        page = served.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(page)}
    for name in (NUM_RUNNING, NUM_WAITING, KV_CACHE_USAGE):
        (sample,) = found[name].samples
        assert (found[name].type, sample.labels) == ("gauge", {"model_name": MODEL})
        assert 0 <= sample.value <= 1
    (info,) = found[LORA_INFO].samples
    names = {"max_lora": "2", "running_lora_adapters": "polite,org/terse", "waiting_lora_adapters": ""}
    assert (found[LORA_INFO].type, info.labels) == ("gauge", names)
    assert abs(info.value - time.time()) < 60, "the value is the time of the scrape"
    bounds = [sample.labels["le"] for sample in found[TTFT].samples if sample.name.endswith("_bucket")]
    assert [float(bound) for bound in bounds] == [*TTFT_BUCKETS, float("inf")]
    (count,) = (sample for sample in found[TTFT].samples if sample.name.endswith("_count"))
    assert (count.value, count.labels) == (1, {"model_name": MODEL})


def test_the_size_of_the_kv_cache_is_that_of_all_engines() -> None:
    """An engine without one has no such metric: the echo engine above."""

    class Pool:
        num_waiting = restarts = ready = 0

        def stats(self) -> list[object]:
            return [EngineStats(kv_cache_tokens=32, kv_cache_capacity=4 * BLOCK_SIZE) for _ in range(2)]

        def totals(self) -> object:
            drafted = {"drafts_total": 5, "draft_tokens_total": 20, "accepted_tokens_total": 9}
            return EngineStats(**drafted, decoded_tokens_total=14, decoding_passes_total=11.5)

    metrics = ServerMetrics(Pool(), ResultCache(max_bytes=0, ttl_s=1), model=MODEL)  # type: ignore[arg-type]
    found = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    assert found[CACHE_CONFIG].samples[0].labels == {
        "model_name": MODEL,
        "block_size": str(BLOCK_SIZE),
        "num_gpu_blocks": "8",
    }
    assert found[KV_CACHE_USAGE].samples[0].value == 64 / (8 * BLOCK_SIZE)
    assert LORA_INFO not in found
    reasons = {sample.labels["reason"] for sample in found["launcher:request_failure"].samples}
    assert "error" in reasons, "a counter that appears with the first error hides it from rate()"
    row = metrics.row()
    assert row["serve/kv_cache_tokens"] == 64
    for name, value in (("num_drafts", 5), ("num_draft_tokens", 20), ("num_accepted_tokens", 9)):
        (sample,) = found[f"vllm:spec_decode_{name}"].samples
        assert (sample.value, sample.labels) == (value, {"model_name": MODEL})
        assert row[f"serve/spec_decode_{name}"] == value
    assert row["serve/decoding_passes"] / row["serve/decoded_tokens"] == 11.5 / 14
