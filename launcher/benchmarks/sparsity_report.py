"""Report of ``job=sparsify``: shares of zeros, perplexity, sizes and rates."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.benchmarks.quantization_report import AFTER, BEFORE, Fidelity, megabytes, ratio_text
from launcher.config.sparsity import UNSTRUCTURED, Pruning
from launcher.utils.schema import to_tree

_NUMBER = re.compile(r"(^|\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class PrunedMatrix:
    """Size and zeros of one pruned matrix."""

    size: tuple[int, int]
    """Outputs and inputs."""
    zeros_before: float
    """Share of zeros of the original."""
    zeros_after: float

    @property
    def numel(self) -> int:
        """Number of its weights."""
        return math.prod(self.size)


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """A pruned model compared with its original."""

    model: str
    method: Pruning
    precision: str
    calibration_tokens: int
    """0 for a method without calibration."""
    matrices: Mapping[str, PrunedMatrix]
    """By the layer's name."""
    weight_bytes: int
    """Bytes of one weight in memory."""
    memory: int
    """Bytes of the whole model in memory, zeros included: the same before and after."""
    disk: Mapping[str, int]
    """Bytes of weights in files; without ``before`` where they come from no files."""
    fidelity: Fidelity
    engine: Mapping[str, Mapping[int, list[dict[str, float]]]]
    """Rates of ``before`` and ``after`` by batch, one entry a round."""
    prompt: str
    samples: Mapping[str, str]
    pruned_s: float
    """Seconds that pruning took, calibration included."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of the pruned matrices with their zeros."""
        return sum(each.numel for each in self.matrices.values()) * self.weight_bytes

    @property
    def bitmask_bytes(self) -> int:
        """Bytes of the matrices' other weights, and a bit for each weight."""
        return sum(
            round(each.numel * (1 - each.zeros_after)) * self.weight_bytes + each.numel // 8
            for each in self.matrices.values()
        )

    @property
    def zeros(self) -> dict[str, float]:
        """Share of zeros in all pruned matrices together, before and after."""
        total = sum(each.numel for each in self.matrices.values())
        return {
            BEFORE: sum(each.zeros_before * each.numel for each in self.matrices.values()) / total,
            AFTER: sum(each.zeros_after * each.numel for each in self.matrices.values()) / total,
        }

    def metrics(self) -> dict[str, float]:
        """Return the findings by name."""
        kept = self.fidelity
        found = {
            "matrices": float(len(self.matrices)),
            "zeros_before": self.zeros[BEFORE],
            "zeros_after": self.zeros[AFTER],
            "dense_bytes": float(self.dense_bytes),
            "bitmask_bytes": float(self.bitmask_bytes),
            "disk_after_bytes": float(self.disk[AFTER]),
            "pruned_s": self.pruned_s,
            "perplexity_before": kept.perplexity_before,
            "perplexity_after": kept.perplexity_after,
            "perplexity_growth": kept.growth,
            "divergence": kept.divergence,
            "agreement": kept.agreement,
        }
        for batch, quantity, before, after in self._speeds():
            found[f"engine/{quantity}_at_{batch}_before"] = before
            found[f"engine/{quantity}_at_{batch}_after"] = after
        return found

    def tree(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "model": self.model,
            "sparsity": {"kind": self.method.kind, **to_tree(self.method)},
            "precision": self.precision,
            "calibration_tokens": self.calibration_tokens,
            "matrices": {name: asdict(each) for name, each in self.matrices.items()},
            "zeros": self.zeros,
            "dense_bytes": self.dense_bytes,
            "bitmask_bytes": self.bitmask_bytes,
            "memory_bytes": self.memory,
            "disk_bytes": dict(self.disk),
            "pruned_s": self.pruned_s,
            "fidelity": {**asdict(self.fidelity), "growth": self.fidelity.growth},
            "rates": {
                which: {str(batch): taken for batch, taken in rates.items()} for which, rates in self.engine.items()
            },
            "prompt": self.prompt,
            "samples": dict(self.samples),
            "metrics": self.metrics(),
        }

    def markdown(self, machine: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a page."""
        yield from (f"# {self.model} by {self.method.kind}", "")
        text = f", calibrated on {self.calibration_tokens:,} tokens" if self.calibration_tokens else ""
        pattern = "" if self.method.pattern == UNSTRUCTURED else f", {self.method.pattern}"
        yield f"{len(self.matrices)} matrices{pattern}{text}, pruned in {self.pruned_s:.1f} s."
        yield from ("", f"| | before ({self.precision}) | after | ratio |", "|---|---|---|---|")
        yield f"| zeros in these matrices | {self.zeros[BEFORE]:.2%} | {self.zeros[AFTER]:.2%} | |"
        dense, packed = self.dense_bytes, self.bitmask_bytes
        yield f"| these matrices, zeros stored | {megabytes(dense)} | {megabytes(dense)} | {ratio_text(dense, dense)} |"
        yield f"| … other weights and a bitmask | | {megabytes(packed)} | {ratio_text(packed, dense)} |"
        yield f"| the model, in memory | {megabytes(self.memory)} | {megabytes(self.memory)} | 1.000 |"
        before, after = self.disk.get(BEFORE), self.disk[AFTER]
        yield f"| the model, in files | {megabytes(before)} | {megabytes(after)} | {ratio_text(after, before)} |"
        yield from self.fidelity.rows()
        for batch, quantity, one, other in self._speeds():
            name = f"{quantity}, {batch} at a time, the launcher's engine: tokens/s"
            yield f"| {name} | {one:,.1f} | {other:,.1f} | {other / one:.2f} |"
        yield from ("", "| matrices | number | zeros: least | mean | most |", "|---|---|---|---|---|")
        for kind, shares in self._by_kind().items():
            mean = statistics.fmean(shares)
            yield f"| `{kind}` | {len(shares)} | {min(shares):.2%} | {mean:.2%} | {max(shares):.2%} |"
        yield from ("", f"Both continue {self.prompt!r}:", "")
        yield from (f"- {which}: {text!r}" for which, text in self.samples.items())
        yield ""
        yield from (f"- {key}: {value}" for key, value in machine.items())

    def _by_kind(self) -> dict[str, list[float]]:
        """Return the shares of zeros of matrices that differ in the number of the block alone."""
        found: dict[str, list[float]] = defaultdict(list)
        for name, each in self.matrices.items():
            found[_NUMBER.sub(r"\1*", name)].append(each.zeros_after)
        return dict(found)

    def _speeds(self) -> Iterator[tuple[int, str, float, float]]:
        """Yield batch, quantity and medians."""
        for batch in self.engine[BEFORE]:
            for quantity in ("prefill", "decode"):
                before, after = (
                    statistics.median(taken[f"{quantity}_per_s"] for taken in self.engine[which][batch])
                    for which in (BEFORE, AFTER)
                )
                yield batch, quantity, before, after
