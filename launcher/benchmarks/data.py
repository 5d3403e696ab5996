"""The run's data: how fast it becomes tokens, and how fast tokens become batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.data.base import Corpus
from launcher.errors import ConfigError
from launcher.wording import component_text

if TYPE_CHECKING:
    from launcher.benchmarks.results import Case, Results
    from launcher.config import Run
    from launcher.context import Context

_MEASURE, _PREPARE = "launcher.benchmarks.reading:measure", "launcher.benchmarks.reading:prepare"
_LOAD = "load"


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Benchmark):
    """The corpus of the run with its tokenizer: text into an empty cache, and the cache into batches as training does.

    Batches are made in the rank's own thread when a step asks for them: ``load`` says how many it gets a second.
    """

    kind: ClassVar[str] = "data"
    headline: ClassVar[tuple[str, ...]] = ("threads", "sequence_length", "micro_batch")
    needs_model: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    threads: tuple[int, ...] = (1, 0)
    """Threads that tokenise, each a case; 0 is one for each core that the process may use, as in every run."""

    sequence_length: int = 128
    """Tokens of a sequence that is loaded."""

    micro_batch: int = 8
    """Sequences of a batch."""

    seconds: float = 1.0
    """How long batches are loaded, in each round."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse counts that measure nothing."""
        yield from super().problems()
        yield from self.below(1, "micro_batch")
        yield from self.below(2, "sequence_length")
        if self.seconds <= 0:
            yield self.refuse("seconds", "must be above 0", "set benchmark.seconds=1")
        if not self.threads or len(set(self.threads)) < len(self.threads) or min(self.threads) < 0:
            yield self.refuse("threads", "takes different numbers of at least 0", "set benchmark.threads=[1,0]")

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse data without text, and what its model would refuse of it."""
        if not isinstance(run.data, Corpus):
            why = "its tokens are made up, and no text is read"
            yield ConfigError("data", run.data.kind, why=why, fix="set data=text or data=hf")
            return
        shape = run.model.shape()
        if shape is None:
            return
        if self.sequence_length > shape.context:
            why = f"{run.model.name} takes at most {shape.context} tokens"
            yield self.refuse("sequence_length", why, f"set benchmark.sequence_length={shape.context}")
        if run.data.trains_tokenizer and run.data.vocab_size > shape.vocab_size:
            why = f"{run.model.name} has {shape.vocab_size} rows of embedding, one a token"
            yield run.data.refuse("vocab_size", why, f"set data.vocab_size={shape.vocab_size}")

    @property
    def num_measurements(self) -> int:
        """Each number of threads, and loading, in each round."""
        return self.repeats * (len(self.threads) + 1)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the data and what is done with it."""
        yield "data", component_text(run.data)
        yield "tokenised", f"whole, into an empty cache, by {', '.join(map(_threads, self.threads))}"
        yield "loaded", f"batches of {self.micro_batch} x {self.sequence_length} tokens for {self.seconds:g} s"

    def run(self, context: Context) -> Results:
        """Tokenise under each number of threads and load, in turn."""
        from launcher.benchmarks.carried import packed
        from launcher.benchmarks.isolated import run_isolated
        from launcher.benchmarks.results import Case, Results
        from launcher.benchmarks.sampling import sample_in_turn

        with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="tokens-") as folder:
            about = {"data": packed(context.run.data), "model": packed(context.run.model)}
            cold, full = ({**about, "folder": str(Path(folder) / name)} for name in ("cold", "full"))
            prepared = run_isolated(_PREPARE, full, beat=lambda: context.heartbeat.beat("prepare"))
            asked = {
                **{_tokenise(count): {**cold, "warmup": self.warmup, "threads": count} for count in self.threads},
                _LOAD: {**full, "warmup": self.warmup, "load": self._load(context)},
            }
            samples = sample_in_turn(_MEASURE, asked, repeats=self.repeats, context=context)
        cases = [
            Case(
                name=name, samples={key: tuple(one[key] for one in taken) for key in taken[0] if key.endswith("_per_s")}
            )
            for name, taken in samples.items()
        ]
        return Results(
            benchmark=self,
            cases=cases,
            facts={"cold start": prepared, **{name: _facts(taken) for name, taken in samples.items()}},
            said=tuple(self._said(prepared, samples, cases)),
            metrics={f"{case.name}/{key}": case.median(key) for case in cases for key in case.samples},
        )

    def _load(self, context: Context) -> dict[str, Any]:
        names = ("sequence_length", "micro_batch", "seconds")
        return {**{name: getattr(self, name) for name in names}, "seed": context.run.job.seed}

    def _said(
        self, prepared: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[Case]
    ) -> Iterator[str]:
        by_name = {case.name: case for case in cases}
        yield (
            f"corpus: {prepared['text_bytes'] / 1e6:,.2f} MB of text are {prepared['tokens']:,} tokens "
            f"of a vocabulary of {prepared['vocab_size']:,}"
        )
        yield f"first run: {prepared['cold_s']:.2f} s from an empty cache to tokens, its tokenizer included"
        for count in self.threads:
            case = by_name[_tokenise(count)]
            rate = f"{case.median('tokens_per_s'):,.0f} tokens/s, {case.median('text_mb_per_s'):.2f} MB/s of text"
            yield f"tokenise by {_threads(count)}: {rate}"
        first, *others = (by_name[_tokenise(count)].median("tokens_per_s") for count in self.threads)
        for count, speed in zip(self.threads[1:], others, strict=True):
            yield f"{_threads(count)}: {speed / first:.2f} times {_threads(self.threads[0])}"
        case = by_name[_LOAD]
        rate = f"{case.median('sequences_per_s'):,.0f} sequences/s, {case.median('tokens_per_s'):,.0f} tokens/s"
        yield f"load: {rate}, in one thread"
        for names, what in (([_tokenise(n) for n in self.threads], "tokens"), ([_LOAD], "first batches")):
            digests = {sample["digest"] for name in names for sample in samples[name]}
            same = "the same every time" if len(digests) == 1 else f"NOT the same: {len(digests)} different ones"
            yield f"{what}: {same}"


def _tokenise(threads: int) -> str:
    return f"tokenise/{threads or 'all'}"


def _threads(count: int) -> str:
    return {0: "a thread a core", 1: "1 thread"}.get(count, f"{count} threads")


def _facts(taken: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is not a rate: digests once each, times and counts of every round."""
    names = [name for name in taken[0] if not name.endswith("_per_s")]
    return {name: sorted({one[name] for one in taken}) for name in names}
