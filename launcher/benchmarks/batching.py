"""Ways of putting requests together, compared on the same queue: seconds, requests a second, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.benchmarks.load.lengths import parse_lengths
from launcher.errors import ConfigError
from launcher.paths import PathText
from launcher.serving.limits import Batching, Limits

if TYPE_CHECKING:
    from launcher.benchmarks.results import Case, Results
    from launcher.config import Run
    from launcher.context import Context

ARTICLE = ("人工智能的发展趋势", "机器学习的未来", "深度学习的挑战", "自然语言处理的进展", "计算机视觉应用")
"""The five texts of the article's example."""


@dataclass(frozen=True, kw_only=True)
class BatchingBenchmark(Benchmark):
    """The run's model answers a queue that is there at once, under each way in turn. The defaults are the article's."""

    kind: ClassVar[str] = "batching"
    headline: ClassVar[tuple[str, ...]] = ("requests", "inputs", "outputs", "max_batch", "max_wait_s")
    how: ClassVar[str] = "each with an engine of its own"
    needs_model: ClassVar[bool] = True
    takes_few_bits: ClassVar[bool] = True

    ways: tuple[Batching, ...] = ("none", "static", "dynamic", "continuous")
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

    def problems(self) -> Iterator[ConfigError]:
        """Refuse an empty comparison and lengths that are none."""
        yield from super().problems()
        yield from self.below(1, "requests", "max_batch", "bucket")
        yield from self.below(0, "max_wait_s")
        if not self.ways or len(set(self.ways)) < len(self.ways):
            yield self.refuse("ways", "names nothing to compare, or something twice", "leave benchmark.ways out")
        for name in ("inputs", "outputs"):
            text = getattr(self, name)
            if (name, text) == ("inputs", "article"):
                continue
            try:
                parse_lengths(text)
            except ValueError as error:
                yield self.refuse(name, str(error), f"set benchmark.{name}=32")

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.ways)

    def limits(self, way: Batching) -> Limits:
        """Return what an engine is given."""
        return Limits(
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

    def run(self, context: Context) -> Results:
        """Answer the queue under each way in turn, ``repeats`` times."""
        from launcher.benchmarks.queue import answer_in_turn
        from launcher.benchmarks.results import Results, collect

        found = answer_in_turn(self, context)
        quantities = ("elapsed_s", "requests_per_s", "each_s", "whole_p50_s", "whole_p99_s", "padding_share")
        cases = [collect(way, found[way], quantities) for way in self.ways]
        digests = {sample["answers"] for samples in found.values() for sample in samples}
        return Results(
            benchmark=self,
            cases=cases,
            facts={way: found[way][-1] for way in self.ways},
            said=tuple(self._said(cases, len(digests), context)),
            metrics=_metrics(cases),
        )

    def _said(self, cases: Sequence[Case], num_answers: int, context: Context) -> Iterator[str]:
        """Yield what the article prints, for each way."""
        for case in cases:
            yield (
                f"{case.name}: {self.requests} requests in {case.median('elapsed_s'):.2f} s, "
                f"{case.median('requests_per_s'):.2f} requests/s, "
                f"mean {1000 * case.median('each_s'):.1f} ms a request, padding {case.median('padding_share'):.1%}"
            )
        yield from (f"{name}: {value:.2f} times none" for name, value in _metrics(cases).items())
        same = "the same under every way" if num_answers == 1 else f"{num_answers} different sets of them"
        yield f"answers: {same} (precision={context.run.precision.kind})"
        if context.run.model.weights == "random":
            yield "weights: random, so the answers mean nothing; their speed is that of trained ones"


def _metrics(cases: Sequence[Case]) -> dict[str, float]:
    """Return the throughput of each way as a multiple of that of one by one."""
    speeds = {case.name: case.median("requests_per_s") for case in cases}
    if "none" not in speeds:
        return {}
    return {f"{name}/speedup": speed / speeds["none"] for name, speed in speeds.items() if name != "none"}
