"""Job quantize: store a model's weights in fewer bits and report what that saves and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.component import class_title
from launcher.config.job.compression import CompressionJob
from launcher.config.quantization import Quantization
from launcher.config.run import Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class Quantize(CompressionJob):
    """Quantize by the group ``quantization``, and compare with the original model.

    It compares bytes, held-out loss, speed and a sample.
    """

    kind: ClassVar[str] = "quantize"
    stages: ClassVar[tuple[str, ...]] = ("build", "save", "compare", "measure", "sample")

    def unused_strategy(self, run: Run) -> str:
        """Return that no strategy shards quantized weights."""
        return "job=quantize holds the whole model on one rank"

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject a run that names no method, and formats that other layers cannot be in."""
        if not isinstance(run.quantization, Quantization):
            why = "job=quantize needs a quantization method"
            yield ConfigError("quantization", "none", why=why, fix="set quantization=int8_weight")
        yield from super().validate_run(run, world_size=world_size)
        if run.precision.kind in ("fp8", "fp16", "tf32"):
            why = "layers that are not quantized must be in fp32 or bf16"
            yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=bf16")

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield a package that is missing, and an output that would be overwritten."""
        if isinstance(run.quantization, Quantization):
            yield from run.quantization.validate_machine("quantization")
        yield from super().validate_machine(run, run_dir)

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the method and the comparisons."""
        if isinstance(run.quantization, Quantization):
            yield "method", f"{run.quantization.kind}: {class_title(type(run.quantization)).rstrip('.')}"
        yield from super().describe(run, world_size=world_size)
