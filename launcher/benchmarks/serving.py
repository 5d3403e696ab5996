"""A server under load: latencies, throughput, goodput, at one or several levels of load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from launcher.benchmarks.base import Benchmark
from launcher.benchmarks.load.calls import read_trace
from launcher.benchmarks.load.figures import Slo
from launcher.benchmarks.load.http import parse_address
from launcher.benchmarks.load.lengths import parse_lengths
from launcher.errors import ConfigError
from launcher.paths import PathText

if TYPE_CHECKING:
    from launcher.benchmarks.results import Case, Results
    from launcher.config import Run
    from launcher.context import Context

QUANTITIES = (
    *("tokens_per_s", "requests_per_s", "goodput_per_s", "first_p50_s", "first_p99_s"),
    *("per_token_p50_s", "gap_p99_s", "whole_p50_s", "whole_p99_s"),
)
"""Figures that the table shows; the JSON holds all."""


@dataclass(frozen=True, kw_only=True)
class ServingBenchmark(Benchmark):
    """Load on an OpenAI-compatible server: any that runs, or one that is started here with the run's model."""

    kind: ClassVar[str] = "serving"
    headline: ClassVar[tuple[str, ...]] = ("mode", "inputs", "outputs", "seconds")
    how: ClassVar[str] = "all levels in turn, on one server"
    takes_few_bits: ClassVar[bool] = True

    repeats: int = 1
    """Rounds; each goes through all levels, with prompts of its own, so that no cache of prompts helps."""

    url: str | None = None
    """Address of the server (``http://127.0.0.1:8000``); ``null`` starts one with the run's model and ends it again."""

    served_name: str | None = None
    """What requests call the model; ``null`` takes the first that the server names."""

    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key, where the server wants one."""

    serve: dict[str, Any] = field(default_factory=dict)
    """Options of job=serve for the server that is started here: ``{batching: dynamic, max_requests: 16}``."""

    mode: Literal["closed", "open"] = "closed"
    """``closed`` keeps so many requests under way; in ``open`` they come when they come, and latencies count from the
    time at which a request was due, so that a server that stalls cannot hide it (coordinated omission)."""

    levels: tuple[float, ...] = (1, 4, 8, 16)
    """Requests at a time where ``mode`` is ``closed``, requests a second (Poisson) where it is ``open``."""

    seconds: float = 30.0
    """How long each level lasts; requests that are under way at its end are broken off."""

    trace: PathText | None = None
    """File of requests: JSON lines of what goes into each body (``prompt`` or ``messages``, ``max_tokens``, …), again
    from its beginning where it ends; ``null`` draws words from ``job.seed``."""

    inputs: str = "16-256"
    """Words of a prompt, about a token each: 64, 16-256, or lognormal:96:0.8:1024 (median, sigma, most)."""

    outputs: str = "16-128"
    """``max_tokens``, in the same grammar."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that every body gets: ``{ignore_eos: true}`` where a server knows it."""

    slo_first_s: float | None = 2.0
    """A good answer's time to the first token; ``null`` asks for nothing."""

    slo_per_token_s: float | None = 0.2
    """A good answer's mean time a token after it."""

    slo_whole_s: float | None = None
    """A good answer's time to its end."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse addresses, lengths and levels that are none."""
        yield from super().problems()
        for name, parse in (("inputs", parse_lengths), ("outputs", parse_lengths), ("url", parse_address)):
            text = getattr(self, name)
            try:
                if text is not None:
                    parse(text)
            except ValueError as error:
                yield self.refuse(name, str(error), f"leave benchmark.{name} out, or write it so")
        if self.seconds <= 0:
            yield self.refuse("seconds", "must be above 0", "set benchmark.seconds=30")
        wrong = [level for level in self.levels if level <= 0 or (self.mode == "closed" and level != int(level))]
        if wrong or not self.levels or len(set(self.levels)) < len(self.levels):
            kind = "whole numbers above 0" if self.mode == "closed" else "numbers above 0"
            yield self.refuse("levels", f"takes different {kind}", "set benchmark.levels=[1,4,8,16]")
        if self.url is not None and self.serve:
            yield self.refuse("serve", "belongs to a server that is started here", "leave it or benchmark.url out")

    def preflight(self) -> Iterator[ConfigError]:
        """Yield a trace that cannot be read."""
        if self.trace is not None:
            try:
                read_trace(Path(self.trace).expanduser())
            except (OSError, ValueError) as error:
                yield self.refuse("trace", str(error), "mend it, or leave benchmark.trace out")

    @property
    def needs_model(self) -> bool:  # type: ignore[override]
        """Whether it starts a server."""
        return self.url is None

    @property
    def server_options(self) -> Mapping[str, Any] | None:
        """Options of the job=serve that it starts, if it does."""
        return self.serve if self.url is None else None

    @property
    def slo(self) -> Slo:
        """What makes an answer a good one."""
        return Slo(first_s=self.slo_first_s, per_token_s=self.slo_per_token_s, whole_s=self.slo_whole_s)

    @property
    def num_measurements(self) -> int:
        """Each level in each round."""
        return self.repeats * len(self.levels)

    def name_of(self, level: float) -> str:
        """Return what a level is called."""
        return f"{level:g} at a time" if self.mode == "closed" else f"{level:g} a second"

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the server and the load."""
        own = f"job=serve with {run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "server", self.url or own
        yield "requests", self.trace or f"{self.inputs} words, {self.outputs} tokens"
        yield "load", f"{self.mode}: {', '.join(map(self.name_of, self.levels))}; {self.seconds:g} s each"

    def run(self, context: Context) -> Results:
        """Put the server under each level of load in turn."""
        from launcher.benchmarks.load.levels import measure_levels
        from launcher.benchmarks.results import Results, collect

        found = measure_levels(self, context)
        cases = [collect(name, answers, QUANTITIES) for name, answers in found.items()]
        return Results(
            benchmark=self,
            cases=cases,
            facts={name: {"rounds": answers} for name, answers in found.items()},
            said=tuple(self._said(found, cases)),
            metrics={f"{case.name}/{name}": case.median(name) for case in cases for name in QUANTITIES},
        )

    def _said(self, found: Mapping[str, Sequence[Mapping[str, Any]]], cases: Sequence[Case]) -> Iterator[str]:
        for case in cases:
            yield (
                f"{case.name}: {case.median('tokens_per_s'):.1f} tokens/s; first token after "
                f"{case.median('first_p50_s'):.3f} s (99 %: {case.median('first_p99_s'):.3f} s), "
                f"{case.median('goodput_per_s'):.2f} good answers/s"
            )
        for name, answers in found.items():
            bad: Counter[str] = Counter()
            for answer in answers:
                bad.update({key: int(count) for key, count in answer.items() if _is_error(key)})
            if bad:
                yield f"{name}: errors {', '.join(f'{key[6:]} {count}' for key, count in bad.items())}"
        most = max(answer["client_share"] for answers in found.values() for answer in answers)
        late = max(answer["late_p99_s"] for answers in found.values() for answer in answers)
        yield f"load generator: at most {most:.1%} of a core; requests sent at most {1000 * late:.1f} ms late (99 %)"
        slo = {"first token": self.slo_first_s, "a token": self.slo_per_token_s, "end": self.slo_whole_s}
        asked = ", ".join(f"{name} within {value:g} s" for name, value in slo.items() if value is not None)
        yield f"good answers: {asked or 'all whole ones'}"


def _is_error(name: str) -> bool:
    """Whether a figure counts answers that went wrong; those that the end of a level broke off did not."""
    return name.startswith("error/") and name != "error/unfinished"
