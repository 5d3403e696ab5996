"""Activation checkpointing of an encoder: memory saved, time added, and whether gradients stay the same."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.benchmarks.results import Case, Results
    from launcher.context import Context

_KEEP = "none"
_STEP, _COMPARE = "launcher.benchmarks.encoder:step", "launcher.benchmarks.encoder:compare"


@dataclass(frozen=True, kw_only=True)
class ActivationBenchmark(Benchmark):
    """One forward and backward pass of torch's TransformerEncoderLayers in fp32, on the same weights and inputs.

    The defaults are a BERT-base encoder on 32 sequences of 512 tokens: without checkpointing about 11 GB.
    """

    kind: ClassVar[str] = "activation"
    headline: ClassVar[tuple[str, ...]] = ("layers", "width", "heads", "batch", "sequence", "every", "repeats")

    layers: int = 12
    """Encoder layers."""

    width: int = 768
    """Size of a token's vector."""

    heads: int = 12
    """Attention heads; they divide the width."""

    feedforward: int = 3072
    """Width of the hidden layer of each feed-forward block."""

    batch: int = 32
    """Sequences."""

    sequence: int = 512
    """Tokens in each of them."""

    every: int = 2
    """The case between all and none: every so many layers one is recomputed, from the first one on."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse sizes that make no encoder, and a case that is another one again."""
        yield from super().problems()
        yield from self.below(1, "layers", "width", "heads", "feedforward", "batch", "sequence")
        yield from self.below(2, "every")
        if self.heads > 0 and self.width % self.heads:
            fitting = max(heads for heads in range(1, self.heads + 1) if self.width % heads == 0)
            why = f"{self.heads} heads do not divide width {self.width}"
            yield self.refuse("heads", why, f"set benchmark.heads={fitting}")

    @property
    def policies(self) -> Mapping[str, int]:
        """Name of each case, and every how many layers it recomputes one; 0 is never."""
        return {_KEEP: 0, f"every_{self.every}": self.every, "full": 1}

    @property
    def num_measurements(self) -> int:
        """Each policy in each round."""
        return self.repeats * len(self.policies)

    def run(self, context: Context) -> Results:
        """Measure all policies in turn and compare their gradients with those of the one that keeps everything."""
        from launcher.benchmarks.results import Results, collect
        from launcher.benchmarks.sampling import sample_in_turn

        with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="gradients-") as folder:
            files = {name: str(Path(folder) / f"{name}.safetensors") for name in self.policies}
            asked = {name: self._arguments(context, every, files[name]) for name, every in self.policies.items()}
            samples = sample_in_turn(_STEP, asked, repeats=self.repeats, context=context, exact_peaks=True)
            compared = {name: compare(files[_KEEP], files[name], context) for name in self.policies}
        cases = [collect(name, samples[name], ("peak_bytes", "step_s")) for name in self.policies]
        return Results(
            benchmark=self,
            cases=cases,
            facts={name: {**compared[name], **_sameness(samples[name])} for name in self.policies},
            said=tuple(self._said(cases, compared, samples)),
            metrics=_metrics(cases, compared),
        )

    def _arguments(self, context: Context, every: int, gradients: str) -> dict[str, Any]:
        sizes = {key: value for key, value in asdict(self).items() if key not in ("repeats", "every")}
        return {**sizes, "every": every, "seed": context.run.job.seed, "rank": context.local_rank, "keep": gradients}

    def _said(
        self, cases: Sequence[Case], compared: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
    ) -> Iterator[str]:
        """Yield what the article prints, for each policy that recomputes something."""
        plain = cases[0]
        yield f"peak without checkpointing: {_gb(plain):.2f} GB above the level before the step"
        for case in cases[1:]:
            saved, added = _saved(plain, case), _added(plain, case)
            found = compared[case.name]
            yield f"peak with checkpointing ({case.name}): {_gb(case):.2f} GB"
            yield f"memory saved ({case.name}): {saved:.1%}"
            yield f"time added ({case.name}): {added:.1%}"
            equal = f"{found['equal_tensors']} of {found['tensors']} gradient tensors equal bit for bit"
            yield f"largest difference ({case.name}): {found['largest_difference']:.3e}, {equal}"
        starts = {(sample["weights"], sample["inputs"]) for taken in samples.values() for sample in taken}
        same = "the same in every process" if len(starts) == 1 else f"NOT the same: {len(starts)} different ones"
        yield f"weights and inputs: {same}"


def compare(plain: str, other: str, context: Context) -> dict[str, Any]:
    """Return how the gradients in two files differ: tensors, those equal bit for bit, largest absolute difference."""
    from launcher.benchmarks.isolated import run_isolated

    return run_isolated(_COMPARE, {"one": plain, "other": other}, beat=lambda: context.heartbeat.beat("compare"))


def _sameness(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the digests of a case: one each where all its repeats computed the same."""
    return {key: sorted({sample[key] for sample in samples}) for key in ("weights", "inputs", "gradients")}


def _gb(case: Case) -> float:
    return case.median("peak_bytes") / 1e9


def _saved(plain: Case, case: Case) -> float:
    return 1 - case.median("peak_bytes") / plain.median("peak_bytes")


def _added(plain: Case, case: Case) -> float:
    """Return the median over rounds of the share of time added: a slow minute hits both sides of a round."""
    pairs = zip(plain.samples["step_s"], case.samples["step_s"], strict=True)
    return statistics.median(after / before for before, after in pairs) - 1


def _metrics(cases: Sequence[Case], compared: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for case in cases[1:]:
        metrics[f"{case.name}/memory_saved"] = _saved(cases[0], case)
        metrics[f"{case.name}/time_added"] = _added(cases[0], case)
        metrics[f"{case.name}/largest_difference"] = compared[case.name]["largest_difference"]
    return metrics
