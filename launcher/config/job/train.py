"""Jobs train and evaluate: next-token training, and the loss of a model on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from launcher.config.profile import ProfileUnit
from launcher.config.run import BatchedJob, LearningJob, Run
from launcher.errors import ConfigError
from launcher.plugins.base import CALLBACK, CROSS_ENTROPY, LOSS, METRIC, TRANSFORM
from launcher.plugins.loading import origin_of, validate_callback_metrics, validate_named

_PIPELINES = ("pipeline", "deepspeed_pipeline")
"""Strategies under which no rank has the whole model, or logits and labels together."""


@dataclass(frozen=True, kw_only=True)
class PluggableJob(BatchedJob):
    """A job whose model and evaluations plugins can extend."""

    transforms: tuple[str, ...] = ()
    """Transforms of plugins, applied in this order to the model before it has weights.
    Name the same ones wherever a checkpoint of the transformed model is loaded."""

    metrics: tuple[str, ...] = ()
    """Metrics of plugins over the held-out tokens, recorded as ``eval/<name>``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject names that no loaded plugin has."""
        yield from super().validate()
        yield from validate_named("job.transforms", TRANSFORM, self.transforms)
        yield from validate_named("job.metrics", METRIC, self.metrics)

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject transforms and metrics where a rank has only some layers of the model."""
        yield from super().validate_run(run, world_size=world_size)
        if run.parallel.kind in _PIPELINES:
            for field, what in (("transforms", "the whole model"), ("metrics", "the logits")):
                if names := getattr(self, field):
                    option = f"job.{field}"
                    why = f"under parallel={run.parallel.kind} no rank has {what}"
                    fix = f"leave {option} out, or set parallel=ddp, fsdp or zero2"
                    yield ConfigError(option, f"[{','.join(names)}]", why=why, fix=fix)

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the transforms and metrics, with the plugins that add them."""
        yield from super().describe(run, world_size=world_size)
        for group, field in ((TRANSFORM, "transforms"), (METRIC, "metrics")):
            if names := getattr(self, field):
                yield field, ", ".join(f"{name} ({origin_of(group, name)})" for name in names)


@dataclass(frozen=True, kw_only=True)
class Train(LearningJob, PluggableJob):
    """Next-token training with evaluation on a held-out split."""

    kind: ClassVar[str] = "train"
    saves: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    handles_preemption: ClassVar[bool] = True

    steps: int = 300
    """Optimizer steps in the whole run; a resumed run continues up to this number."""

    eval_every: int = 50
    """Optimizer steps between evaluations; 0 evaluates only at the end."""

    eval_sequences: int = 64
    """Held-out sequences in one evaluation, over all ranks."""

    log_every: int = 10
    """Optimizer steps between printed lines; metrics are recorded at every step."""

    peak_tflops: float | None = None
    """Peak TFLOP/s of one rank's device, for perf/mfu; ``null`` looks the GPU up in a table.
    CPUs, and GPUs that are not in the table, have none."""

    sample_prompt: str = "The"
    """Text that the sample at the end of the run continues."""

    sample_tokens: int = 48
    """Length of that sample in tokens; 0 generates none."""

    loss: str = CROSS_ENTROPY
    """Loss to train on: ``cross_entropy``, or one of a plugin.

    Evaluations always measure cross-entropy."""

    callbacks: tuple[str, ...] = ()
    """Callbacks of plugins, called on every rank around steps, evaluations and checkpoints."""

    @property
    def profile_unit(self) -> ProfileUnit:
        """Its own steps."""
        return "steps"

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Return the prompt of a sample that is not taken."""
        return {} if self.sample_tokens else {"sample_prompt": "job.sample_tokens=0 generates no sample"}

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that make no training run."""
        yield from super().validate()
        yield from self.validate_minimum(1, "log_every", "eval_sequences")
        yield from self.validate_minimum(0, "eval_every", "sample_tokens")
        yield from validate_named("job.loss", LOSS, (self.loss,), own=(CROSS_ENTROPY,))
        yield from validate_named("job.callbacks", CALLBACK, self.callbacks)
        yield from validate_callback_metrics("job.callbacks", self.callbacks)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            yield self.error(
                "peak_tflops", "must be above 0", "leave it out, or set it to the value in the device's data sheet"
            )

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject a plugin's loss where the last stage of a pipeline computes it."""
        yield from super().validate_run(run, world_size=world_size)
        if self.loss != CROSS_ENTROPY and run.parallel.kind in _PIPELINES:
            why = f"parallel={run.parallel.kind} trains on {CROSS_ENTROPY} only"
            yield self.error("loss", why, f"set job.loss={CROSS_ENTROPY}, or parallel=ddp")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the optimizer steps."""
        return self.steps

    def files(self) -> Iterator[str]:
        """Yield the picture of the losses and the sample."""
        yield "loss.png"
        if self.sample_tokens:
            yield "sample.txt"


@dataclass(frozen=True, kw_only=True)
class Evaluate(PluggableJob):
    """Forward passes over the held-out split, under any strategy; nothing is trained."""

    kind: ClassVar[str] = "evaluate"
    trains: ClassVar[bool] = False
    resumes: ClassVar[bool] = True
    handles_preemption: ClassVar[bool] = True

    eval_sequences: int = 64
    """Held-out sequences, over all ranks; fewer where the data has fewer."""

    repeats: int = 1
    """Number of repetitions; the first one also warms up, so speed is that of the fastest."""

    @property
    def profile_unit(self) -> ProfileUnit:
        """Its own steps."""
        return "steps"

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that measure nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "eval_sequences", "repeats")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the global batches of all repeats, the last of each perhaps not full."""
        return self.repeats * -(-self.eval_sequences // self.batch(run, world_size=world_size).global_batch)

    def num_sequences(self, run: Run, *, world_size: int) -> int:
        """Return those of all repeats: the last batch of each may not be full."""
        return self.repeats * self.eval_sequences
