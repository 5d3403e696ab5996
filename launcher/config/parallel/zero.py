"""ZeRO: optimizer state, gradients and parameters partitioned over the data-parallel ranks.

Options, bytes of model state, and the DeepSpeed configuration as a pure function of typed options: nothing that changes
numbers is left to a default of DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from launcher.config.model.shape import Shape
from launcher.config.optimizer import AdamW, Optimizer
from launcher.config.parallel.base import EngineKind, Parallel
from launcher.config.parallel.deepspeed_keys import merge_raw_keys, validate_raw_keys
from launcher.config.paths import PathText
from launcher.config.precision import Fp16Precision, Precision
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch, NativeOps, StateBytes

OffloadDevice = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True, kw_only=True)
class Zero(Parallel):
    """ZeRO (arXiv:1910.02054) with offload (arXiv:2101.06840) and Infinity (arXiv:2104.07857)."""

    kind: ClassVar[str] = "zero"
    engine: ClassVar[EngineKind] = "deepspeed"
    summary_fields: ClassVar[tuple[str, ...]] = ("stage",)

    stage: Literal[0, 1, 2, 3] = 3
    """Partitioned state: 0 none, 1 optimizer state, 2 gradients too, 3 parameters too."""

    offload_optimizer: OffloadDevice = "none"
    """Where optimizer state lives; ``cpu`` from stage 1, ``nvme`` at stage 3."""

    offload_parameters: OffloadDevice = "none"
    """Where partitioned parameters live; stage 3 only."""

    nvme_path: PathText | None = None
    """Folder on a fast local disk; needed once anything is offloaded to NVMe.
    Users and runs can share it: each run has a folder ``launcher-<user id>-<run id>`` in it, removed when the run
    ends."""

    pin_memory: bool = True
    """Page-locked host buffers, for faster copies to a GPU.
    Without a GPU the option has no effect, and the run prints that; the staging buffers of NVMe are page-locked in any
    case."""

    overlap_comm: bool = True
    """Reduce gradients during the backward pass."""

    contiguous_gradients: bool = True
    """Copy gradients into one buffer as they come, against fragmentation."""

    reduce_bucket_size: int = 500_000_000
    """Elements reduced at a time."""

    allgather_bucket_size: int = 500_000_000
    """Elements gathered at a time (stages 1 and 2)."""

    prefetch_bucket_size: int = 50_000_000
    """Elements of parameters fetched ahead (stage 3)."""

    persistence_threshold: int = 100_000
    """Parameters with fewer elements are never partitioned (stage 3)."""

    max_live_parameters: int = 1_000_000_000
    """Elements of parameters resident at once before some are released (stage 3)."""

    sub_group_size: int = 1_000_000_000
    """Elements the optimizer updates at a time (stage 3): smaller uses less memory with NVMe."""

    nvme_buffer_size: int = 100_000_000
    """Elements of one staging buffer for parameters on NVMe; at least the largest parameter."""

    nvme_buffer_count: int = 5
    """Staging buffers for parameters on NVMe."""

    max_parameters_in_ram: int = 0
    """Elements of parameters kept in host RAM although they are offloaded to NVMe; 0 keeps none."""

    low_memory_bf16: bool = False
    """Keep weights, gradients and moments in bf16: 10 bytes a parameter, not 16; less precise."""

    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys, checked against DeepSpeed's own.
    They may not contradict a field of ours."""

    @property
    def skips_steps(self) -> bool:
        """Whether DeepSpeed checks the gradient before it updates: not without ZeRO's optimizer."""
        return self.stage > 0

    @property
    def keeps_state_on_nvme(self) -> bool:
        """Whether anything lives on NVMe."""
        return "nvme" in (self.offload_optimizer, self.offload_parameters)

    def validate(self) -> Iterator[ConfigError]:
        """Reject offload that the stage lacks, empty buffers, and useless or contradicting raw keys."""
        if self.stage == 0 and self.offload_optimizer == "cpu":
            yield self.error("offload_optimizer", "ZeRO stage 0 cannot offload", "set parallel.stage=1 or more")
        if self.stage != 3 and self.offload_optimizer == "nvme":
            why = f"only ZeRO stage 3 offloads to NVMe and parallel.stage={self.stage}"
            yield self.error("offload_optimizer", why, "set parallel.stage=3 or parallel.offload_optimizer=cpu")
        if self.stage != 3 and self.offload_parameters != "none":
            why = f"only ZeRO stage 3 partitions parameters and parallel.stage={self.stage}"
            yield self.error("offload_parameters", why, "set parallel.stage=3 or parallel.offload_parameters=none")
        if self.keeps_state_on_nvme and not self.nvme_path:
            why = "parameters or optimizer state are offloaded to NVMe, and no folder is set"
            yield ConfigError("parallel.nvme_path", "null", why=why, fix="set parallel.nvme_path=<a folder on NVMe>")
        if self.low_memory_bf16 and self.stage == 0:
            fix = "set parallel.stage=1 or more"
            yield self.error("low_memory_bf16", "DeepSpeed supports bf16 master weights from ZeRO stage 1 on", fix)
        yield from self.validate_minimum(
            1,
            "reduce_bucket_size",
            "allgather_bucket_size",
            "prefetch_bucket_size",
            "max_live_parameters",
            "sub_group_size",
            "nvme_buffer_size",
            "nvme_buffer_count",
        )
        yield from self.validate_minimum(0, "persistence_threshold", "max_parameters_in_ram")
        yield from validate_raw_keys(self.deepspeed)

    def validate_run(
        self, world_size: int, precision: Precision, *, optimizer: Optimizer, shape: Shape | None
    ) -> Iterator[ConfigError]:
        """Reject what the other groups rule out."""
        if self.low_memory_bf16 and precision.compute != "bf16":
            fix = "set precision=bf16 or parallel.low_memory_bf16=false"
            yield self.error("low_memory_bf16", f"precision is {precision.compute}", fix)
        if isinstance(precision, Fp16Precision) and self.stage == 0:
            why = "DeepSpeed does not scale the loss of fp16 without ZeRO, so gradients underflow and are not clipped"
            yield self.error("stage", why, "set parallel.stage=1, or parallel=ddp, or precision=bf16")
        if isinstance(precision, Fp16Precision) and precision.min_scale != int(precision.min_scale):
            why = "DeepSpeed takes a whole number"
            yield precision.error("min_scale", why, f"set precision.min_scale={int(precision.min_scale)}")
        reason = "NVMe offload" if self.offload_optimizer == "nvme" else "low_memory_bf16 with offload"
        native_only = self.offload_optimizer == "nvme" or (self.low_memory_bf16 and self.offload_optimizer == "cpu")
        if native_only and isinstance(optimizer, AdamW) and optimizer.implementation == "torch":
            why = f"{reason} needs DeepSpeed's own Adam"
            yield ConfigError("optimizer.implementation", "torch", why=why, fix="set optimizer.implementation=auto")
        if self.offload_parameters == "nvme" and shape and shape.largest_param > self.nvme_buffer_size:
            why = f"the model's largest parameter has {shape.largest_param} elements"
            yield self.error("nvme_buffer_size", why, f"set parallel.nvme_buffer_size={shape.largest_param}")

    def warnings(self, precision: Precision, *, on_gpu: bool) -> Iterator[str]:
        """Say what works, but not as one might expect."""
        if self.stage == 0 and precision.compute != "fp32":
            yield f"ZeRO stage 0 in {precision.compute} differs from the other stages by rounding; stage 1 does not"
        offloads_to_ram = "cpu" in (self.offload_optimizer, self.offload_parameters)
        if offloads_to_ram and not on_gpu:
            yield "ranks compute on the CPU, so offloading to host RAM moves nothing off a device and only adds copies"
        if (offloads_to_ram or self.keeps_state_on_nvme) and self.pin_memory and not on_gpu:
            yield "parallel.pin_memory has no effect without a GPU"

    def state_bytes(self, shape: Shape, world_size: int, precision: Precision, *, moments: float = 2) -> StateBytes:
        """Return one rank's share, by the formulas in ``zero_memory``."""
        return zero_state_bytes(
            shape.num_params,
            world_size,
            stage=self.stage,
            compute_bytes=precision.compute_bytes,
            low_memory=self.low_memory_bf16,
            optimizer_on=self.offload_optimizer,
            parameters_on=self.offload_parameters,
            parameters_in_ram=self.max_parameters_in_ram,
        )

    def state_formula(self, world_size: int, precision: Precision, *, moments: float = 2) -> str:
        """Return the formula of ``state_bytes`` as text."""
        return zero_memory_formula(
            world_size,
            stage=self.stage,
            mixed=precision.compute != "fp32",
            low_memory=self.low_memory_bf16,
            offloads=self.offload_optimizer != "none",
        )

    def wants_native_adam(self, optimizer: Optimizer) -> bool:
        """Whether DeepSpeed's compiled Adam is asked for; ``auto`` asks for it under offload."""
        if not isinstance(optimizer, AdamW):
            return False
        offloads = self.offload_optimizer != "none"
        return optimizer.implementation == "native" or (optimizer.implementation == "auto" and offloads)

    def native_ops(self, optimizer: Optimizer) -> NativeOps:
        """Return the native operators to compile before ranks start."""
        needed: list[str] = []
        optional: list[str] = []
        if isinstance(optimizer, AdamW) and self.wants_native_adam(optimizer):
            replaceable = optimizer.implementation == "auto" and self.offload_optimizer == "cpu"
            replaceable = replaceable and not self.low_memory_bf16
            adam = "fused_adam" if self.offload_optimizer == "none" else "cpu_adam"
            (optional if replaceable else needed).append(adam)
        if self.keeps_state_on_nvme:
            needed += ["pin_memory", "async_io"]
        return NativeOps(needed=tuple(needed), optional=tuple(optional))

    def engine_config(
        self, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision
    ) -> dict[str, Any]:
        """Return the engine's configuration.

        A rank may take torch's Adam where the native one is missing.
        """
        return self.ds_config(
            batch=batch,
            clip_norm=clip_norm,
            optimizer=optimizer,
            precision=precision,
            native_adam=self.wants_native_adam(optimizer),
        )

    def ds_config(
        self, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision, native_adam: bool
    ) -> dict[str, Any]:
        """Return DeepSpeed's whole configuration; see ``launcher.config.parallel.zero``."""
        return render_deepspeed_config(
            self, batch=batch, clip_norm=clip_norm, optimizer=optimizer, precision=precision, native_adam=native_adam
        )


def render_deepspeed_config(
    zero: Zero, *, batch: Batch, clip_norm: float, optimizer: Optimizer, precision: Precision, native_adam: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration, ready for JSON.

    Args:
        zero: the strategy.
        batch: the solved batch equation.
        clip_norm: largest global gradient norm; 0 turns clipping off.
        optimizer: Optimizer's numbers; the rate is the peak, which each step overwrites.
        precision: what forward and backward compute in.
        native_adam: DeepSpeed's compiled Adam instead of torch's.
    """
    ours = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": clip_norm,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": precision.compute,
        "data_types": {"grad_accum_dtype": precision.compute},
        "optimizer": _optimizer(optimizer, native_adam=native_adam),
        "zero_force_ds_cpu_optimizer": native_adam,
        "bf16": _bf16(zero, precision),
        "fp16": _fp16(precision),
        "zero_optimization": _zero_optimization(zero),
        "wall_clock_breakdown": False,
    }
    if zero.keeps_state_on_nvme:
        ours["aio"] = {
            "block_size": 1048576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    return merge_raw_keys(ours, zero.deepspeed)


def _optimizer(optimizer: Optimizer, *, native_adam: bool) -> dict[str, Any]:
    if not isinstance(optimizer, AdamW):
        return {"type": optimizer.kind, "params": {}}  # the plan refuses it
    params: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if native_adam:
        return {"type": "AdamW", "params": {**params, "adam_w_mode": True}}
    return {"type": "AdamW", "params": {**params, "torch_adam": True, "fused": True}}


def _bf16(zero: Zero, precision: Precision) -> dict[str, Any]:
    return {
        "enabled": precision.compute == "bf16",
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": zero.low_memory_bf16,
        "bf16_optimizer_states": zero.low_memory_bf16,
    }


def _fp16(precision: Precision) -> dict[str, Any]:
    if not isinstance(precision, Fp16Precision):
        return {"enabled": False}
    return {
        "enabled": True,
        "auto_cast": False,
        "loss_scale": 0,
        "initial_scale_power": precision.initial_scale_power,
        "loss_scale_window": precision.scale_window,
        "hysteresis": precision.hysteresis,
        "consecutive_hysteresis": False,
        "min_loss_scale": precision.min_scale,
    }


def _zero_optimization(zero: Zero) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": zero.contiguous_gradients,
        "overlap_comm": zero.overlap_comm,
        "reduce_scatter": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "allgather_bucket_size": zero.allgather_bucket_size,
        "round_robin_gradients": False,
    }
    if zero.stage == 3:
        config |= {
            "sub_group_size": zero.sub_group_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_live_parameters,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        }
    if zero.offload_optimizer != "none":
        config["offload_optimizer"] = _offload_section(zero, zero.offload_optimizer, buffer_count=4)
    if zero.offload_parameters != "none":
        config["offload_param"] = _offload_section(zero, zero.offload_parameters, buffer_count=zero.nvme_buffer_count)
        if zero.offload_parameters == "nvme":
            config["offload_param"] |= {"buffer_size": zero.nvme_buffer_size, "max_in_cpu": zero.max_parameters_in_ram}
    return config


def _offload_section(zero: Zero, device: str, *, buffer_count: int) -> dict[str, Any]:
    place: dict[str, Any] = {"device": device, "pin_memory": zero.pin_memory}
    if device == "nvme":
        place |= {"nvme_path": zero.nvme_path, "buffer_count": buffer_count}
    return place


_PARTITIONED_SINCE = {"optimizer": 1, "gradients": 2, "parameters": 3}
"""The stage from which each part of the state is divided among the ranks."""


def zero_state_bytes(
    num_params: int,
    world_size: int,
    *,
    stage: int,
    compute_bytes: int,
    low_memory: bool,
    optimizer_on: str,
    parameters_on: str,
    parameters_in_ram: int,
) -> StateBytes:
    """Return one rank's parameters, gradients and optimizer state in bytes.

    Args:
        num_params: Ψ.
        world_size: N, the data-parallel size.
        stage: ZeRO's stage, 0 to 3.
        compute_bytes: bytes of one value in the compute format.
        low_memory: master weights, gradients and moments in bf16.
        optimizer_on: ``none``, ``cpu`` or ``nvme``.
        parameters_on: ``none``, ``cpu`` or ``nvme``.
        parameters_in_ram: elements that stay in RAM although parameters are on NVMe.
    """
    share = -(-num_params // world_size)
    elements = {name: share if stage >= since else num_params for name, since in _PARTITIONED_SINCE.items()}
    state_size = 2 if low_memory else 4
    copies_weights = compute_bytes == 2 or stage > 0
    parameters = compute_bytes * elements["parameters"]
    gradients = compute_bytes * elements["gradients"]
    optimizer = state_size * (3 if copies_weights else 2) * elements["optimizer"]
    staged = state_size * share if optimizer_on != "none" else 0
    host = nvme = 0
    if optimizer_on == "cpu":
        host += optimizer + staged
    if optimizer_on == "nvme":
        nvme += optimizer + staged
    if optimizer_on != "none" and stage == 3:
        host += gradients
    if parameters_on == "cpu":
        host += parameters
    if parameters_on == "nvme":
        resident = compute_bytes * min(parameters_in_ram, elements["parameters"])
        host, nvme = host + resident, nvme + parameters - resident
    return StateBytes(parameters=parameters, gradients=gradients + staged, optimizer=optimizer, host=host, nvme=nvme)


def zero_memory_formula(world_size: int, *, stage: int, mixed: bool, low_memory: bool, offloads: bool) -> str:
    """Return the formula of :func:`state_bytes` as text, with its source."""
    size, state_size = (2 if mixed else 4), (2 if low_memory else 4)
    states = state_size * (3 if mixed or stage > 0 else 2)
    terms = (("parameters", size, "weights"), ("gradients", size, "gradients"), ("optimizer", states, "optimizer"))
    parts = []
    for term, factor, word in terms:
        divided = f" / {world_size}" if stage >= _PARTITIONED_SINCE[term] else ""
        parts.append(f"{factor}N {word}{divided}")
    if offloads:
        parts.append(f"{state_size}N gradients / {world_size} beside the offloaded optimizer")
    return f"{' + '.join(parts)} bytes (ZeRO, arXiv:1910.02054, sec. 3.1 and 5)"
