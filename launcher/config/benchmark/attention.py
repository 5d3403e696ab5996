"""Benchmark of attention kernels at growing sequence length: peak memory, time and error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from launcher.config.run import Benchmark, Run
from launcher.errors import ConfigError
from launcher.utils.text import bytes_text

Kernel = Literal["mha_weights", "mha", "mha_eval", "eager", "sdpa_math", "sdpa_flash", "flex"]
Direction = Literal["forward", "backward"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
NO_BACKWARD: tuple[Kernel, ...] = ("mha_eval",)
"""torch takes its fast path of evaluation where no gradient is wanted, and there only."""
_HIDDEN = {"forward": 12, "backward": 22}
"""Input-sized arrays (sequences x tokens x width) alive at the peak: measured, rounded up."""
_SCORES = {"forward": 3, "backward": 4}
"""Arrays of scores (sequences x heads x tokens x tokens) alive at the peak.
In kernels that write them out."""

_WRITES_NO_SCORES = {
    "forward": ("mha", "sdpa_flash", "flex"),
    "backward": ("mha", "sdpa_flash", "flex"),
}

_PROCESS_BYTES = 10**9
"""The interpreter, torch, and what a comparison with the reference takes besides."""


@dataclass(frozen=True, kw_only=True)
class AttentionPoint:
    """One process of each round."""

    kernel: Kernel
    direction: Direction
    sequence_length: int

    @property
    def name(self) -> str:
        """Return its name in results and metrics."""
        return f"{self.kernel}/{self.direction}/{self.sequence_length}"

    def bytes_needed(self, *, batch_size: int, hidden_size: int, num_attention_heads: int, value_bytes: int) -> int:
        """Return how much memory its process takes at most: an estimate that errs on the large side."""
        hidden, scores = (
            batch_size * self.sequence_length * hidden_size,
            batch_size * num_attention_heads * self.sequence_length**2,
        )
        num_scores = 0 if self.kernel in _WRITES_NO_SCORES[self.direction] else _SCORES[self.direction]
        compared = 4 * 8 * hidden  # output and gradient against a reference in fp64
        return value_bytes * (_HIDDEN[self.direction] * hidden + num_scores * scores) + compared + _PROCESS_BYTES


TOLERANCES = {"fp32": 5e-6, "fp16": 4e-3, "bf16": 3e-2}
"""Relative error, as a share of the largest value, that rounding explains.
42 times the precision of fp32, whose sums are as long as the sequence, and 4 times that of the short formats, whose
sums are kept in fp32."""


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark(Benchmark):
    """Self-attention with its projections, on equal weights and inputs under every kernel.

    There is no mask.

    ``mha_weights`` is nn.MultiheadAttention as called by default, ``mha`` with ``need_weights=False``, ``mha_eval`` the
    same in evaluation, ``eager`` softmax(QK^T)V as written; ``sdpa_math``, ``sdpa_flash`` and ``flex`` are torch's.
    """

    kind: ClassVar[str] = "attention"
    used_groups: ClassVar[frozenset[str]] = frozenset({"precision"})
    summary_fields: ClassVar[tuple[str, ...]] = (
        "sequence_lengths",
        "batch_size",
        "hidden_size",
        "num_attention_heads",
        "passes",
    )

    kernels: tuple[Kernel, ...] = KERNELS
    """Kernels to compare; memory saved refers to nn.MultiheadAttention's default (mha_weights)."""

    sequence_lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Sequence lengths in tokens, each measured; lengths that do not fit are left out.
    The report names those left out."""

    batch_size: int = 1
    """Sequences."""

    hidden_size: int = 512
    """Size of a token's vector."""

    num_attention_heads: int = 8
    """Attention heads; they divide hidden_size."""

    passes: Literal["forward", "backward", "both"] = "both"
    """``forward`` has no gradients, ``backward`` computes all of them; ``both`` measures each."""

    tolerance: float | None = None
    """Largest error against fp64 that counts as rounding, as a share of the largest value.
    ``null`` takes 5e-6 in fp32, 4e-3 in fp16, 3e-2 in bf16."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no attention, and comparisons of nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "batch_size", "hidden_size", "num_attention_heads")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            fitting = max(heads for heads in range(1, self.num_attention_heads + 1) if self.hidden_size % heads == 0)
            why = f"{self.num_attention_heads} heads do not divide hidden_size={self.hidden_size}"
            yield self.error("num_attention_heads", why, f"set benchmark.num_attention_heads={fitting}")
        if not self.kernels or len(set(self.kernels)) < len(self.kernels):
            yield self.error("kernels", "is empty or has duplicates", "leave benchmark.kernels out")
        if (
            not self.sequence_lengths
            or len(set(self.sequence_lengths)) < len(self.sequence_lengths)
            or min(self.sequence_lengths) < 1
        ):
            yield self.error(
                "sequence_lengths", "needs distinct lengths of at least 1", "set benchmark.sequence_lengths=[512,1024]"
            )
        if self.tolerance is not None and self.tolerance <= 0:
            yield self.error("tolerance", "must be above 0", "leave benchmark.tolerance out")
        if self.passes == "backward" and set(self.kernels) <= set(NO_BACKWARD):
            why = f"benchmark.kernels={','.join(self.kernels)} has no backward pass"
            yield self.error("passes", why, "set benchmark.passes=forward")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject formats that the kernels do not compute in as a whole."""
        if run.precision.kind not in TOLERANCES:
            why = "the whole layer is computed in one format"
            fix = f"set precision to {' or '.join(TOLERANCES)}"
            yield ConfigError("precision", run.precision.kind, why=why, fix=fix)

    @property
    def chosen_passes(self) -> tuple[Direction, ...]:
        """Each pass that is measured."""
        return ("forward", "backward") if self.passes == "both" else (self.passes,)

    @property
    def points(self) -> list[AttentionPoint]:
        """Return the points to measure, kernels next to each other."""
        return [
            AttentionPoint(kernel=kernel, direction=direction, sequence_length=length)
            for length in self.sequence_lengths
            for direction in self.chosen_passes
            for kernel in self.kernels
            if direction == "forward" or kernel not in NO_BACKWARD
        ]

    @property
    def num_measurements(self) -> int:
        """Each point in each round."""
        return self.repeats * len(self.points)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the kernels, the lengths, and what they take."""
        yield "compared", ", ".join(self.kernels)
        yield "passes", " and ".join(self.chosen_passes)
        yield "precision", run.precision.kind
        largest = max(self.points, key=lambda point: self.bytes_needed(point, run))
        yield (
            "memory",
            f"up to {bytes_text(self.bytes_needed(largest, run))} ({largest.name}); larger ones than fit are left out",
        )

    def bytes_needed(self, point: AttentionPoint, run: Run) -> int:
        """Return the estimated most bytes of the process of a point."""
        size = run.precision.compute_bytes
        return point.bytes_needed(
            batch_size=self.batch_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            value_bytes=size,
        )
