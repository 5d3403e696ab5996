"""Benchmarks of inference in one process: batching, result cache, quantized decoding."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.benchmark.serving import parse_length_distribution
from launcher.config.inference import BatchingMode, EngineLimits
from launcher.config.paths import PathText
from launcher.config.profile import TorchProfile
from launcher.config.quantization import METHODS
from launcher.config.run import Benchmark
from launcher.config.sampling import SamplingParams
from launcher.errors import ConfigError
from launcher.inference.engine.base import EngineRequest

if TYPE_CHECKING:
    from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
    from launcher.config.run import Run
    from launcher.engines.context import Context
    from launcher.inference.engine.base import InferenceEngine
    from launcher.inference.server.result_cache import ResultCache as Kept


EXAMPLE_TEXTS = ("人工智能的发展趋势", "机器学习的未来", "深度学习的挑战", "自然语言处理的进展", "计算机视觉应用")
"""The five texts of the article's example."""


@dataclass(frozen=True, kw_only=True)
class BatchingBenchmark(Benchmark):
    """The run's model answers a queue that is there at once, under each way in turn. The defaults are the article's."""

    kind: ClassVar[str] = "batching"
    headline: ClassVar[tuple[str, ...]] = ("requests", "inputs", "outputs", "max_batch", "max_wait_s")
    how: ClassVar[str] = "each with an engine of its own"
    needs_model: ClassVar[bool] = True
    takes_few_bits: ClassVar[bool] = True

    ways: tuple[BatchingMode, ...] = ("none", "static", "dynamic", "continuous")
    """What is compared, as job.batching has it."""

    requests: int = 50
    """Requests in the queue."""

    inputs: str = "article"
    """``article`` takes its five texts in turn; else tokens of each prompt: 64, 16-256, lognormal:48:0.8:256."""

    outputs: str = "32"
    """Tokens of each answer, in the same grammar; the model's end-of-sequence token ends none."""

    max_batch: int = 16
    """Requests in a batch, and requests that are worked on at the same time under ``continuous``."""

    max_wait_s: float = 0.1
    """How long the first request of a batch waits for others."""

    bucket: int = 32
    """Under ``dynamic``, prompts are alike whose lengths agree when rounded up to a multiple of this."""

    prefix_cache: bool = False
    """Whether equal beginnings are computed once: it would spare most of the work where texts repeat."""

    tokenizer: PathText = "model"
    """Of the article's texts: ``model`` is the model's own, ``bytes`` has a token for each byte, else a folder."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse an empty comparison and lengths that are none."""
        yield from super().validate()
        yield from self.validate_minimum(1, "requests", "max_batch", "bucket")
        yield from self.validate_minimum(0, "max_wait_s")
        if not self.ways or len(set(self.ways)) < len(self.ways):
            yield self.error("ways", "names nothing to compare, or something twice", "leave benchmark.ways out")
        for name in ("inputs", "outputs"):
            text = getattr(self, name)
            if (name, text) == ("inputs", "article"):
                continue
            try:
                parse_length_distribution(text)
            except ValueError as error:
                yield self.error(name, str(error), f"set benchmark.{name}=32")

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.ways)

    def limits(self, way: BatchingMode) -> EngineLimits:
        """Return what an engine is given."""
        return EngineLimits(
            batching=way,
            max_requests=self.max_batch,
            max_batch=self.max_batch,
            max_wait_s=self.max_wait_s,
            bucket=self.bucket,
            prefix_cache=self.prefix_cache,
        )

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the queue."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "queue", f"{self.requests} requests of {self.inputs}, answers of {self.outputs} tokens, all there at once"
        yield "compared", ", ".join(self.ways)

    def run(self, context: Context) -> BenchmarkResults:
        """Answer the queue under each way in turn, ``repeats`` times."""
        from launcher.benchmarks.batching import measure_batching
        from launcher.benchmarks.results import BenchmarkResults, collect_case

        found = measure_batching(self, context)
        quantities = ("elapsed_s", "requests_per_s", "each_s", "whole_p50_s", "whole_p99_s", "padding_share")
        cases = [collect_case(way, found[way], quantities) for way in self.ways]
        digests = {sample["answers"] for samples in found.values() for sample in samples}
        return BenchmarkResults(
            benchmark=self,
            cases=cases,
            facts={way: found[way][-1] for way in self.ways},
            said=tuple(self._said(cases, len(digests), context)),
            metrics=_batching_metrics(cases),
        )

    def _said(self, cases: Sequence[BenchmarkCase], num_answers: int, context: Context) -> Iterator[str]:
        """Yield what the article prints, for each way."""
        for case in cases:
            yield (
                f"{case.name}: {self.requests} requests in {case.median('elapsed_s'):.2f} s, "
                f"{case.median('requests_per_s'):.2f} requests/s, "
                f"mean {1000 * case.median('each_s'):.1f} ms a request, padding {case.median('padding_share'):.1%}"
            )
        yield from (f"{name}: {value:.2f} times none" for name, value in _batching_metrics(cases).items())
        same = "the same under every way" if num_answers == 1 else f"{num_answers} different sets of them"
        yield f"answers: {same} (precision={context.run.precision.kind})"
        if context.run.model.weights == "random":
            yield "weights: random, so the answers mean nothing; their speed is that of trained ones"


def _batching_metrics(cases: Sequence[BenchmarkCase]) -> dict[str, float]:
    """Return the throughput of each way as a multiple of that of one by one."""
    speeds = {case.name: case.median("requests_per_s") for case in cases}
    if "none" not in speeds:
        return {}
    return {f"{name}/speedup": speed / speeds["none"] for name, speed in speeds.items() if name != "none"}


EXAMPLE_PROMPTS = ("人工智能的发展", "机器学习的应用", "深度学习的未来", "人工智能的发展")


@dataclass(frozen=True, kw_only=True)
class ResultCacheBenchmark(Benchmark):
    """The model answers prompts in turn, through the cache that ``job=serve`` has. The defaults are the article's."""

    kind: ClassVar[str] = "cache"
    headline: ClassVar[tuple[str, ...]] = ("max_length", "temperature", "top_k", "top_p", "no_repeat_ngram")
    how: ClassVar[str] = "all in one process, each with an empty cache"
    needs_model: ClassVar[bool] = True
    takes_few_bits: ClassVar[bool] = True

    prompts: tuple[str, ...] = EXAMPLE_PROMPTS
    """One after the other."""

    max_length: int = 100
    """Tokens of prompt and answer together."""

    temperature: float = 0.7
    """Answers are drawn with job.seed: a cache may only keep what is the same again."""

    top_k: int = 50
    """Of the most likely tokens, as many are kept."""

    top_p: float = 0.95
    """Share of the probability that is kept."""

    no_repeat_ngram: int = 3
    """No so many tokens in a row occur twice."""

    max_bytes: int = 64 * 2**20
    """Room for results."""

    tokenizer: PathText = "model"
    """``model`` is the model's own, ``bytes`` has a token for each byte, else a folder."""

    warm_up: tuple[tuple[int, int], ...] = ((1, 10), (1, 20), (1, 50), (2, 15))
    """Shapes (sequences, tokens) that the engine runs through first."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse a comparison of nothing."""
        yield from super().validate()
        yield from self.validate_minimum(2, "max_length")
        yield from self.validate_minimum(0, "temperature", "top_k", "no_repeat_ngram", "max_bytes")
        if not all(self.prompts) or not self.prompts:
            yield self.error("prompts", "a prompt must not be empty", "leave benchmark.prompts out")

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the prompts."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "prompts", " · ".join(self.prompts)

    def run(self, context: Context) -> BenchmarkResults:
        """Go through the prompts ``repeats`` times."""
        from launcher.benchmarks.harness import case_profiler
        from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
        from launcher.inference.engine.paged_engine import make_paged_engine
        from launcher.inference.server.result_cache import ResultCache as Kept
        from launcher.inference.tokenizer import open_tokenizer

        heartbeat = context.heartbeat.update
        words = open_tokenizer(self.tokenizer, context.run, heartbeat=lambda: heartbeat("load"))
        limits = EngineLimits(prefix_cache=False)  # it would make a repeated prompt cheap without any result
        engine = make_paged_engine(
            context.run, limits=limits, rank=0, world_size=1, heartbeat=lambda: heartbeat("build")
        )
        engine.warm_up(self.warm_up)
        prompts = [tuple(words.encode(text)) for text in self.prompts]
        times: dict[str, list[float]] = {"computed": [], "kept": []}
        for number in range(self.repeats):
            kept = Kept(self.max_bytes, ttl_s=3600.0)
            for prompt in prompts:
                how, seconds = self._answer(engine, kept, prompt, seed=context.run.job.seed)
                times["kept" if how == "hit" else "computed"].append(seconds)
            heartbeat("measure", number + 1)
        if isinstance(context.run.profile, TorchProfile):  # once more, which counts for nothing
            with case_profiler("computed", context) as engine.profiler:
                for prompt in prompts:
                    self._answer(engine, Kept(self.max_bytes, ttl_s=3600.0), prompt, seed=context.run.job.seed)
        engine.close()
        cases = [BenchmarkCase(name=name, samples={"answer_s": tuple(found)}) for name, found in times.items() if found]
        facts = _cache_facts(kept)
        return BenchmarkResults(
            benchmark=self,
            cases=cases,
            facts={"cache": facts},
            said=tuple(_cache_findings(facts, cases)),
            metrics={name: float(value) for name, value in facts.items()},
        )

    def _answer(self, engine: InferenceEngine, kept: Kept, prompt: tuple[int, ...], *, seed: int) -> tuple[str, float]:
        """Return whether the result was there, and after what time."""
        from launcher.inference.server.request_state import RequestState
        from launcher.inference.server.result_cache import result_key

        sampling = SamplingParams(
            max_tokens=max(1, self.max_length - len(prompt)),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            no_repeat_ngram=self.no_repeat_ngram,
            seed=seed,
            ignore_end=True,
        )
        started = time.perf_counter()
        key = result_key("this process", prompt, sampling, ())
        flight, how = kept.find(key, RequestState(EngineRequest(id="one", prompt=prompt, sampling=sampling)))
        if how == "miss":
            engine.add(flight.request)
            while not flight.ended:
                for update in engine.step():
                    flight.hear(update)
            kept.landed(key, flight)
        if flight.trouble is not None:
            raise flight.trouble
        return how, time.perf_counter() - started


def _cache_facts(kept: Kept) -> Mapping[str, Any]:
    asked = kept.hits + kept.misses
    return {
        "hits": kept.hits,
        "misses": kept.misses,
        "hit_rate": kept.hits / asked if asked else 0.0,
        "size": len(kept),
        "size_bytes": kept.bytes,
        "max_bytes": kept.max_bytes,
    }


def _cache_findings(facts: Mapping[str, Any], cases: Any) -> Iterator[str]:
    """Yield what the article prints, and what a hit saves."""
    yield f"hit rate {facts['hit_rate']:.1%}, hits {facts['hits']}, misses {facts['misses']}"
    yield f"size {facts['size']}: {facts['size_bytes']:,} of {facts['max_bytes']:,} bytes"
    for case in cases:
        yield f"{case.name}: {case.median('answer_s') * 1000:.2f} ms an answer"


_DECODE, _BANDWIDTH = "launcher.benchmarks.quantization:decode", "launcher.benchmarks.quantization:read_bandwidth"


DECODING_MODES = ("eager", "compiled", "blocks", "engine")


FORMATS = ("fp32", "bf16")


CTRANSLATE2 = "ctranslate2"


DEFAULT_CASES = (
    "fp32/eager",
    "bf16/eager",
    "fp32/compiled",
    "fp32/blocks",
    "int8_dynamic/eager",
    "int8_dynamic/blocks",
    "int8_weight/eager",
    "int8_weight/blocks",
    "fp32/engine",
    "bf16/engine",
    "int8_weight/engine",
    "int4_weight/engine",
    "nf4/eager",
)


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark(Benchmark):
    """Greedy decoding of the run's model; the first way is what the others are compared with."""

    kind: ClassVar[str] = "quantization"
    headline: ClassVar[tuple[str, ...]] = ("batch", "prompt", "tokens")
    needs_model: ClassVar[bool] = True

    ways: tuple[str, ...] = DEFAULT_CASES
    """WEIGHTS/HOW: weights are fp32, bf16 or a method of the group quantization; ``eager`` is plain forward passes with
    a growing cache, ``compiled`` has torch.compile and a static cache, ``blocks`` too but compiles one block for all,
    ``engine`` is what job=serve computes with."""

    batch: int = 1
    """Sequences at a time."""

    prompt: int = 64
    """Tokens that each begins with."""

    tokens: int = 32
    """Tokens that each is continued by, timed."""

    ctranslate2: str | None = None
    """A folder that CTranslate2's converter wrote, to measure it beside the others."""

    ctranslate2_python: str | None = None
    """The interpreter of an environment that has CTranslate2."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse ways that are none, and a comparison of nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "batch", "prompt", "tokens")
        known = [f"{weights}/{how}" for weights, how in itertools.product((*FORMATS, *METHODS), DECODING_MODES)]
        for way in self.ways:
            if way not in known:
                from launcher.utils.text import did_you_mean

                yield self.error("ways", f"{way} is no WEIGHTS/HOW", did_you_mean(way, known))
        if not self.ways or len(set(self.ways)) < len(self.ways):
            yield self.error("ways", "names nothing to compare, or something twice", "leave benchmark.ways out")
        if (self.ctranslate2 is None) != (self.ctranslate2_python is None):
            why = "a converted model and an interpreter that has CTranslate2 go together"
            yield self.error("ctranslate2", why, "give benchmark.ctranslate2 and benchmark.ctranslate2_python, or none")

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield packages that are missing for one of the ways."""
        for method in sorted({way.partition("/")[0] for way in self.ways} & METHODS.keys()):
            for problem in METHODS[method]().validate_machine("benchmark.ways"):
                yield ConfigError("benchmark.ways", method, why=problem.why, fix=problem.fix.split(",")[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The ways, the peer's among them."""
        return (*self.ways, f"int8/{CTRANSLATE2}") if self.ctranslate2 else self.ways

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.names)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the ways."""
        yield "model", f"{run.model.name}, weights={run.model.weights}; what is not quantised: {run.precision.kind}"
        yield "compared", ", ".join(self.names)

    def run(self, context: Context) -> BenchmarkResults:
        """Measure all ways in turn, each time in a process of its own."""
        from launcher.benchmarks.harness import sample_interleaved
        from launcher.benchmarks.isolated import run_isolated
        from launcher.benchmarks.results import BenchmarkResults, collect_case

        bandwidth = run_isolated(_BANDWIDTH, {}, heartbeat=lambda: context.heartbeat.update("bandwidth"))["bytes_per_s"]
        asked = {name: self._arguments(context, name) for name in self.names}
        samples = sample_interleaved(_DECODE, asked, repeats=self.repeats, context=context)
        quantities = ("token_s", "prefill_per_s", "first_s", "read_bytes")
        cases = [collect_case(name, samples[name], quantities) for name in self.names]
        return BenchmarkResults(
            benchmark=self,
            cases=cases,
            facts={name: _decoding_facts(samples[name], bandwidth) for name in self.names},
            said=tuple(self._said(cases, samples, bandwidth)),
            metrics={**_decoding_metrics(cases, bandwidth), "read_bandwidth_bytes_per_s": bandwidth},
        )

    def _arguments(self, context: Context, name: str) -> dict[str, Any]:
        from launcher.benchmarks.isolated import pack_component

        weights, _, how = name.partition("/")
        run = context.run
        return {
            "model": pack_component(run.model),
            "weights": weights,
            "how": how,
            "rest": weights if weights in FORMATS else run.precision.compute,
            "seed": run.job.seed,
            "batch": self.batch,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "warmup": self.warmup,
            "rank": context.local_rank,
            "peer": [self.ctranslate2_python, self.ctranslate2],
        }

    def _said(
        self, cases: Sequence[BenchmarkCase], samples: Mapping[str, Sequence[Mapping[str, Any]]], bandwidth: float
    ) -> Iterator[str]:
        first = cases[0]
        yield f"memory is read at {bandwidth / 1e9:.1f} GB/s"
        for case in cases:
            seconds = case.median("token_s")
            share = case.median("read_bytes") / seconds / bandwidth
            yield (
                f"{case.name}: {self.batch / seconds:.1f} tokens/s, {first.median('token_s') / seconds:.2f} times "
                f"{first.name}; {share:.0%} of what reading {case.median('read_bytes') / 1e6:.0f} MB a token allows"
            )
        for case in cases:
            if case.name.endswith(("/compiled", "/blocks")):
                started = case.samples["first_s"]
                yield f"{case.name}: compiled in {started[0]:.1f} s, from the cache in {min(started):.1f} s"
        best = min(cases, key=lambda case: case.median("token_s"))
        yield f"best: {best.name}, {first.median('token_s') / best.median('token_s'):.2f} times {first.name}"
        for case in cases[1:]:
            if case.median("token_s") > first.median("token_s"):
                yield f"{case.name} is slower than {first.name} on this machine"
        for name, taken in samples.items():
            if len({sample["digest"] for sample in taken}) > 1:
                yield f"{name}: NOT the same tokens in every process"


def _decoding_facts(samples: Sequence[Mapping[str, Any]], bandwidth: float) -> dict[str, Any]:
    return {"tokens": sorted({sample["digest"] for sample in samples}), "read_bandwidth_bytes_per_s": bandwidth}


def _decoding_metrics(cases: Sequence[BenchmarkCase], bandwidth: float) -> dict[str, float]:
    found = {}
    for case in cases:
        seconds = case.median("token_s")
        found[f"{case.name}/speedup"] = cases[0].median("token_s") / seconds
        found[f"{case.name}/roofline_share"] = case.median("read_bytes") / seconds / bandwidth
    return found
