"""Pipeline parallelism by DeepSpeed: layers in stages, ZeRO-1 between a stage's replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from launcher.config.model.shape import Shape
from launcher.config.optimizer import Optimizer
from launcher.config.parallel.base import EngineKind, Parallel, ParallelDims
from launcher.config.parallel.deepspeed_keys import DEEPSPEED_OPTION, OWNED_ZERO_KEYS, validate_raw_keys
from launcher.config.parallel.zero import Zero
from launcher.config.precision import Precision
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch, NativeOps, StateBytes

PIPELINE_FAMILIES = ("gpt2", "llama")
"""Architectures that ``launcher.models.layers`` can take apart."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedPipeline(Parallel):
    """Pipeline stages by DeepSpeed's ``PipelineModule``, in 1F1B order (arXiv:1806.03377)."""

    kind: ClassVar[str] = "deepspeed_pipeline"
    engine: ClassVar[EngineKind] = "deepspeed"
    summary_fields: ClassVar[tuple[str, ...]] = ("stages", "stage")
    degree_options: ClassVar[tuple[str, ...]] = ("stages",)

    stages: int = 2
    """Ranks that one pipeline is made of."""

    micro_batches: int | None = None
    """Micro-batches a step in each pipeline; default: the batch equation, else twice the stages.
    The batch equation gives ``job.gradient_accumulation_steps``, or ``job.global_batch`` divided."""

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage among parallel pipelines: 0 partitions nothing, 1 the optimizer state.
    2 and 3 are rejected."""

    partition: Literal["blocks", "parameters", "layers"] = "parameters"
    """Measure that balances stages: blocks, parameters, or layers of any kind."""

    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    allgather_bucket_size: int = 500_000_000
    """Elements gathered at a time."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, checked against DeepSpeed's own.
    They may not contradict a field of ours."""

    @property
    def skips_steps(self) -> bool:
        """False: DeepSpeed computes losses and updates weights in one call."""
        return False

    @property
    def zero(self) -> Zero:
        """Return the ZeRO options among the ranks that hold the same stage.

        A pipeline reduces gradients when all of them are there, so there is nothing to overlap with, and copying them
        together would only cost a buffer of ``reduce_bucket_size``.
        """
        return Zero(
            stage=self.stage,
            overlap_comm=False,
            contiguous_gradients=False,
            reduce_bucket_size=self.reduce_bucket_size,
            allgather_bucket_size=self.allgather_bucket_size,
            deepspeed=self.deepspeed,
        )

    @property
    def needs_equal_shapes(self) -> bool:
        """True: stages send each other hidden states of one shape."""
        return True

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Return the micro-batches of a step, where they are set here."""
        return self.micro_batches

    @property
    def default_gradient_accumulation_steps(self) -> int:
        """Return twice the stages: at most a third of the time idle."""
        return 2 * self.stages

    def dims(self, world_size: int) -> ParallelDims:
        """Return the degrees; pipelines side by side take the rest."""
        return ParallelDims(pipeline=self.stages, data=max(1, world_size // self.stages))

    def validate(self) -> Iterator[ConfigError]:
        """Reject wrong counts of stages or micro-batches, ZeRO above stage 1, and useless raw keys."""
        yield from self.validate_minimum(1, "stages", "micro_batches", "reduce_bucket_size", "allgather_bucket_size")
        if self.stage > 1:
            why = (
                "partitioned gradients are reduced after every backward pass, and a pipeline's after the last of a step"
            )
            yield self.error("stage", why, "set parallel.stage=1, or parallel=zero2 or zero3 without a pipeline")
        yield from self._validate_raw()

    def _validate_raw(self) -> Iterator[ConfigError]:
        """Reject raw keys, and those of ``zero`` options that a pipeline does not have."""
        for problem in validate_raw_keys(self.deepspeed):
            owner = OWNED_ZERO_KEYS.get(problem.option.removeprefix(f"{DEEPSPEED_OPTION}.zero_optimization."))
            if owner is not None and not hasattr(self, owner.removeprefix("parallel.")):
                why = "DeepSpeed's pipeline does not support it"
                yield ConfigError(problem.option, problem.value, why=why, fix=f"remove {problem.option}")
            else:
                yield problem

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Reject more stages than blocks, unknown models, and what ZeRO's engine does not support."""
        yield from self.zero.validate_run(world_size, precision, optimizer=optimizer, shape=shape)
        if self.stage == 0 and precision.compute == "bf16":
            why = "DeepSpeed's pipeline in bf16 is not verified without ZeRO"
            yield self.error("stage", why, "set parallel.stage=1 or precision=fp32")
        if shape is None:
            return
        if self.stages > shape.num_hidden_layers:
            why = f"the model has {shape.num_hidden_layers} layers, and each stage needs one"
            yield self.error("stages", why, f"set parallel.stages={shape.num_hidden_layers}")
        if shape.family not in PIPELINE_FAMILIES:
            yield unknown_family_error(shape.family)

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return a stage's share, as if stages were equal, under ZeRO among the ranks that hold it."""
        beside = self.dims(world_size).data
        stage = replace(shape, num_params=-(-shape.num_params // self.stages))
        return self.zero.state_bytes(stage, beside, precision)

    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the formula of ``state_bytes`` as text."""
        inner = self.zero.state_formula(self.dims(world_size).data, precision)
        return f"N = parameters / {self.stages} stages, taken as equal: {inner}"

    def native_ops(self, optimizer: Optimizer) -> NativeOps:
        """Return the native operators to compile before ranks start."""
        return self.zero.native_ops(optimizer)

    def engine_config(
        self, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision
    ) -> dict[str, Any]:
        """Return DeepSpeed's whole configuration."""
        return self.ds_config(
            batch=batch,
            clip_norm=clip_norm,
            optimizer=optimizer,
            precision=precision,
            native_adam=self.zero.wants_native_adam(optimizer),
        )

    def ds_config(
        self, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision, native_adam: bool
    ) -> dict[str, Any]:
        """Return ZeRO's configuration; the engine clips where DeepSpeed's clipping is wrong.

        Without ZeRO its norm counts the first stage alone (``clip_grad_norm_`` in ``deepspeed/runtime/utils.py`` asks
        for rank 0 among the ranks of one model), so each stage would clip by a number of its own.
        """
        clips = self.stage > 0
        return self.zero.ds_config(
            batch=batch,
            clip_norm=clip_norm if clips else 0.0,
            optimizer=optimizer,
            precision=precision,
            native_adam=native_adam,
        )


def unknown_family_error(family: str) -> ConfigError:
    """Return the error for a model whose parts are not known to work one by one."""
    why = f"the layers of {family} are not verified to work as a chain, only those of {', '.join(PIPELINE_FAMILIES)}"
    return ConfigError("parallel", "deepspeed_pipeline", why=why, fix="choose parallel=pipeline or another strategy")
