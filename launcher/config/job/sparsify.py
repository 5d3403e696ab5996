"""Job sparsify: set weights of a model to zero and report what that costs and saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import class_title
from launcher.config.job.compression import CompressionJob
from launcher.config.model.linear_layers import module_sizes
from launcher.config.run import Run
from launcher.config.sparsity import UNSTRUCTURED, CalibratedPruning, Pruning
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sparsify(CompressionJob):
    """Prune by the group ``sparsity``, and compare with the original model.

    It compares shares of zeros, bytes, held-out loss, speed and a sample.
    """

    kind: ClassVar[str] = "sparsify"
    stages: ClassVar[tuple[str, ...]] = ("original", "build", "calibrate", "save", "compare", "measure", "sample")

    def unused_strategy(self, run: Run) -> str:
        """Return that one rank holds the model."""
        return "job=sparsify holds the whole model on one rank"

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject a run that names no method, and matrices that the pattern does not fit."""
        sparsity = run.sparsity
        if not isinstance(sparsity, Pruning):
            why = "job=sparsify needs a method of pruning"
            yield ConfigError("sparsity", sparsity.kind, why=why, fix="set sparsity=wanda, sparsegpt or magnitude")
        elif (modules := module_sizes(run.model)) is not None:
            sizes = {name: (size.outputs, size.inputs) for name, size in modules.linear.items()}
            yield from sparsity.validate_matrices(sizes, family=run.model.name)
        yield from super().validate_run(run, world_size=world_size)
        if run.precision.kind in ("fp8", "fp16", "tf32"):
            why = "layers are calibrated, and weights saved, in fp32 or bf16"
            yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=fp32")

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the method, the share of zeros, the text and the comparisons."""
        sparsity = run.sparsity
        if isinstance(sparsity, Pruning):
            yield "method", f"{sparsity.kind}: {class_title(type(sparsity)).rstrip('.')}"
            pattern = "" if sparsity.pattern == UNSTRUCTURED else f", {sparsity.pattern}"
            yield "zeros", f"{sparsity.zero_share:.1%} of each matrix in the blocks{pattern}"
        if isinstance(sparsity, CalibratedPruning):
            if sparsity.spread:
                low, high = sparsity.shares
                yield "allocation", f"OWL: {low:.1%} to {high:.1%} of a block, {sparsity.zero_share:.1%} on average"
            count = sparsity.calibration_sequences
            yield "calibrated on", f"{count} training sequences of {self.sequence_length} tokens"
        yield from super().describe(run, world_size=world_size)
