"""The cache benchmark: answer prompts in turn, through the result cache that job=serve has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.harness import case_profiler
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.inference import EngineLimits
from launcher.config.profile import TorchProfile
from launcher.config.sampling import SamplingParams
from launcher.inference.engine.base import EngineRequest
from launcher.inference.engine.paged_engine import make_paged_engine
from launcher.inference.server.request_state import RequestState
from launcher.inference.server.result_cache import ResultCache, result_key
from launcher.inference.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from launcher.config.benchmark.inference import ResultCacheBenchmark
    from launcher.engines.context import Context
    from launcher.inference.engine.base import InferenceEngine


def run_cache_benchmark(benchmark: ResultCacheBenchmark, context: Context) -> BenchmarkResults:
    """Go through the prompts ``repeats`` times."""
    heartbeat = context.heartbeat.update
    tokenizer = open_tokenizer(benchmark.tokenizer, context.run, heartbeat=lambda: heartbeat("load"))
    limits = EngineLimits(enable_prefix_caching=False)  # it would make a repeated prompt cheap without any result
    engine = make_paged_engine(context.run, limits=limits, rank=0, world_size=1, heartbeat=lambda: heartbeat("build"))
    engine.warm_up(benchmark.warm_up)
    prompts = [tuple(tokenizer.encode(text)) for text in benchmark.prompts]
    times: dict[str, list[float]] = {"computed": [], "kept": []}
    for number in range(benchmark.repeats):
        cache = ResultCache(benchmark.max_bytes, ttl_s=3600.0)
        for prompt in prompts:
            status, seconds = _answer(benchmark, engine, cache, prompt, seed=context.run.job.seed)
            times["kept" if status == "hit" else "computed"].append(seconds)
        heartbeat("measure", number + 1)
    if isinstance(context.run.profile, TorchProfile):  # once more, which counts for nothing
        with case_profiler("computed", context) as engine.profiler:
            for prompt in prompts:
                _answer(
                    benchmark, engine, ResultCache(benchmark.max_bytes, ttl_s=3600.0), prompt, seed=context.run.job.seed
                )
    engine.close()
    cases = [BenchmarkCase(name=name, samples={"answer_s": tuple(found)}) for name, found in times.items() if found]
    facts = _facts(cache)
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={"cache": facts},
        findings=tuple(_findings(facts, cases)),
        metrics={name: float(value) for name, value in facts.items()},
    )


def _answer(
    benchmark: ResultCacheBenchmark, engine: InferenceEngine, cache: ResultCache, prompt: tuple[int, ...], *, seed: int
) -> tuple[str, float]:
    """Return the cache status of a prompt, and the seconds until its result."""
    sampling = SamplingParams(
        max_tokens=max(1, benchmark.max_length - len(prompt)),
        temperature=benchmark.temperature,
        top_k=benchmark.top_k,
        top_p=benchmark.top_p,
        no_repeat_ngram_size=benchmark.no_repeat_ngram_size,
        seed=seed,
        ignore_eos=True,
    )
    started = time.perf_counter()
    key = result_key("this process", prompt, sampling, ())
    state, status = cache.find(key, RequestState(EngineRequest(id="one", prompt=prompt, sampling=sampling)))
    if status == "miss":
        engine.add(state.request)
        while not state.is_done:
            for output in engine.step():
                state.handle_output(output)
        cache.complete(key, state)
    if state.error is not None:
        raise state.error
    return status, time.perf_counter() - started


def _facts(cache: ResultCache) -> Mapping[str, Any]:
    asked = cache.hits + cache.misses
    return {
        "hits": cache.hits,
        "misses": cache.misses,
        "hit_rate": cache.hits / asked if asked else 0.0,
        "size": len(cache),
        "size_bytes": cache.bytes,
        "max_bytes": cache.max_bytes,
    }


def _findings(facts: Mapping[str, Any], cases: Any) -> Iterator[str]:
    """Yield the article's figures, and the time that a hit saves."""
    yield f"hit rate {facts['hit_rate']:.1%}, hits {facts['hits']}, misses {facts['misses']}"
    yield f"size {facts['size']}: {facts['size_bytes']:,} of {facts['max_bytes']:,} bytes"
    for case in cases:
        yield f"{case.name}: {case.median('answer_s') * 1000:.2f} ms an answer"
