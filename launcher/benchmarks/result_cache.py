"""Results that are kept: the article's four prompts, of which the last repeats the first, and what that saves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError
from launcher.paths import PathText
from launcher.profile import TorchProfile
from launcher.serving.limits import Limits
from launcher.serving.values import Request, Sampling

if TYPE_CHECKING:
    from launcher.benchmarks.results import Results
    from launcher.config import Run
    from launcher.context import Context
    from launcher.serving.base import Generator
    from launcher.serving.front.results import Results as Kept

ARTICLE = ("人工智能的发展", "机器学习的应用", "深度学习的未来", "人工智能的发展")


@dataclass(frozen=True, kw_only=True)
class ResultCacheBenchmark(Benchmark):
    """The model answers prompts in turn, through the cache that ``job=serve`` has. The defaults are the article's."""

    kind: ClassVar[str] = "cache"
    headline: ClassVar[tuple[str, ...]] = ("max_length", "temperature", "top_k", "top_p", "no_repeat_ngram")
    how: ClassVar[str] = "all in one process, each with an empty cache"
    needs_model: ClassVar[bool] = True
    takes_few_bits: ClassVar[bool] = True

    prompts: tuple[str, ...] = ARTICLE
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

    def problems(self) -> Iterator[ConfigError]:
        """Refuse a comparison of nothing."""
        yield from super().problems()
        yield from self.below(2, "max_length")
        yield from self.below(0, "temperature", "top_k", "no_repeat_ngram", "max_bytes")
        if not all(self.prompts) or not self.prompts:
            yield self.refuse("prompts", "a prompt must not be empty", "leave benchmark.prompts out")

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the prompts."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "prompts", " · ".join(self.prompts)

    def run(self, context: Context) -> Results:
        """Go through the prompts ``repeats`` times."""
        from launcher.benchmarks.profiled import case_profiler
        from launcher.benchmarks.results import Case, Results
        from launcher.serving.front.results import Results as Kept
        from launcher.serving.make import make_generator
        from launcher.serving.words import open_words

        beat = context.heartbeat.beat
        words = open_words(self.tokenizer, context.run, beat=lambda: beat("load"))
        limits = Limits(prefix_cache=False)  # it would make a repeated prompt cheap without any result
        engine = make_generator(context.run, limits=limits, rank=0, world_size=1, beat=lambda: beat("build"))
        engine.warm_up(self.warm_up)
        prompts = [tuple(words.encode(text)) for text in self.prompts]
        times: dict[str, list[float]] = {"computed": [], "kept": []}
        for number in range(self.repeats):
            kept = Kept(self.max_bytes, ttl_s=3600.0)
            for prompt in prompts:
                how, seconds = self._answer(engine, kept, prompt, seed=context.run.job.seed)
                times["kept" if how == "hit" else "computed"].append(seconds)
            beat("measure", number + 1)
        if isinstance(context.run.profile, TorchProfile):  # once more, which counts for nothing
            with case_profiler("computed", context) as engine.profiler:
                for prompt in prompts:
                    self._answer(engine, Kept(self.max_bytes, ttl_s=3600.0), prompt, seed=context.run.job.seed)
        engine.close()
        cases = [Case(name=name, samples={"answer_s": tuple(found)}) for name, found in times.items() if found]
        facts = _facts(kept)
        return Results(
            benchmark=self,
            cases=cases,
            facts={"cache": facts},
            said=tuple(_said(facts, cases)),
            metrics={name: float(value) for name, value in facts.items()},
        )

    def _answer(self, engine: Generator, kept: Kept, prompt: tuple[int, ...], *, seed: int) -> tuple[str, float]:
        """Return whether the result was there, and after what time."""
        from launcher.serving.front.flight import Flight
        from launcher.serving.front.identity import key_of

        sampling = Sampling(
            max_tokens=max(1, self.max_length - len(prompt)),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            no_repeat_ngram=self.no_repeat_ngram,
            seed=seed,
            ignore_end=True,
        )
        started = time.perf_counter()
        key = key_of("this process", prompt, sampling, ())
        flight, how = kept.find(key, Flight(Request(id="one", prompt=prompt, sampling=sampling)))
        if how == "miss":
            engine.add(flight.request)
            while not flight.ended:
                for update in engine.step():
                    flight.hear(update)
            kept.landed(key, flight)
        if flight.trouble is not None:
            raise flight.trouble
        return how, time.perf_counter() - started


def _facts(kept: Kept) -> Mapping[str, Any]:
    asked = kept.hits + kept.misses
    return {
        "hits": kept.hits,
        "misses": kept.misses,
        "hit_rate": kept.hits / asked if asked else 0.0,
        "size": len(kept),
        "size_bytes": kept.bytes,
        "max_bytes": kept.max_bytes,
    }


def _said(facts: Mapping[str, Any], cases: Any) -> Iterator[str]:
    """Yield what the article prints, and what a hit saves."""
    yield f"hit rate {facts['hit_rate']:.1%}, hits {facts['hits']}, misses {facts['misses']}"
    yield f"size {facts['size']}: {facts['size_bytes']:,} of {facts['max_bytes']:,} bytes"
    for case in cases:
        yield f"{case.name}: {case.median('answer_s') * 1000:.2f} ms an answer"
