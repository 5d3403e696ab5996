"""How fast one sequence is continued with weights in fewer bits, and how near that comes to what memory allows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError
from launcher.quantization.methods import METHODS

if TYPE_CHECKING:
    from launcher.benchmarks.results import Case, Results
    from launcher.config import Run
    from launcher.context import Context

_WORKER, _BANDWIDTH = "launcher.benchmarks.decoding:decode", "launcher.benchmarks.decoding:read_bandwidth"
HOWS = ("eager", "compiled", "blocks", "engine")
FORMATS = ("fp32", "bf16")
PEER = "ctranslate2"
USUAL = (
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

    ways: tuple[str, ...] = USUAL
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

    def problems(self) -> Iterator[ConfigError]:
        """Refuse ways that are none, and a comparison of nothing."""
        yield from super().problems()
        yield from self.below(1, "batch", "prompt", "tokens")
        known = [f"{weights}/{how}" for weights, how in itertools.product((*FORMATS, *METHODS), HOWS)]
        for way in self.ways:
            if way not in known:
                from launcher.suggest import did_you_mean

                yield self.refuse("ways", f"{way} is no WEIGHTS/HOW", did_you_mean(way, known))
        if not self.ways or len(set(self.ways)) < len(self.ways):
            yield self.refuse("ways", "names nothing to compare, or something twice", "leave benchmark.ways out")
        if (self.ctranslate2 is None) != (self.ctranslate2_python is None):
            why = "a converted model and an interpreter that has CTranslate2 go together"
            yield self.refuse(
                "ctranslate2", why, "give benchmark.ctranslate2 and benchmark.ctranslate2_python, or none"
            )

    def preflight(self) -> Iterator[ConfigError]:
        """Yield packages that are missing for one of the ways."""
        for method in sorted({way.partition("/")[0] for way in self.ways} & METHODS.keys()):
            for problem in METHODS[method]().preflight("benchmark.ways"):
                yield ConfigError("benchmark.ways", method, why=problem.why, fix=problem.fix.split(",")[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The ways, the peer's among them."""
        return (*self.ways, f"int8/{PEER}") if self.ctranslate2 else self.ways

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.names)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the ways."""
        yield "model", f"{run.model.name}, weights={run.model.weights}; what is not quantised: {run.precision.kind}"
        yield "compared", ", ".join(self.names)

    def run(self, context: Context) -> Results:
        """Measure all ways in turn, each time in a process of its own."""
        from launcher.benchmarks.isolated import run_isolated
        from launcher.benchmarks.results import Results, collect
        from launcher.benchmarks.sampling import sample_in_turn

        bandwidth = run_isolated(_BANDWIDTH, {}, beat=lambda: context.heartbeat.beat("bandwidth"))["bytes_per_s"]
        asked = {name: self._arguments(context, name) for name in self.names}
        samples = sample_in_turn(_WORKER, asked, repeats=self.repeats, context=context)
        quantities = ("token_s", "prefill_per_s", "first_s", "read_bytes")
        cases = [collect(name, samples[name], quantities) for name in self.names]
        return Results(
            benchmark=self,
            cases=cases,
            facts={name: _facts(samples[name], bandwidth) for name in self.names},
            said=tuple(self._said(cases, samples, bandwidth)),
            metrics={**_metrics(cases, bandwidth), "read_bandwidth_bytes_per_s": bandwidth},
        )

    def _arguments(self, context: Context, name: str) -> dict[str, Any]:
        from launcher.benchmarks.carried import packed

        weights, _, how = name.partition("/")
        run = context.run
        return {
            "model": packed(run.model),
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
        self, cases: Sequence[Case], samples: Mapping[str, Sequence[Mapping[str, Any]]], bandwidth: float
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


def _facts(samples: Sequence[Mapping[str, Any]], bandwidth: float) -> dict[str, Any]:
    return {"tokens": sorted({sample["digest"] for sample in samples}), "read_bandwidth_bytes_per_s": bandwidth}


def _metrics(cases: Sequence[Case], bandwidth: float) -> dict[str, float]:
    found = {}
    for case in cases:
        seconds = case.median("token_s")
        found[f"{case.name}/speedup"] = cases[0].median("token_s") / seconds
        found[f"{case.name}/roofline_share"] = case.median("read_bytes") / seconds / bandwidth
    return found
