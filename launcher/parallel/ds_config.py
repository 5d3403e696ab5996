"""The DeepSpeed configuration as a pure function of typed options: nothing that changes numbers is left to a default.

DeepSpeed's defaults move between versions (``gradient_clipping`` became 1.0 in 0.19.3), so every key that touches the
arithmetic is written out, also where it equals today's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.batch import Batch
from launcher.optim.adamw import AdamW
from launcher.parallel.ds_keys import merged
from launcher.precision import Fp16, Precision

if TYPE_CHECKING:
    from launcher.parallel.zero import Zero


def render(
    zero: Zero, *, batch: Batch, clip_norm: float, optimizer: AdamW, precision: Precision, native_adam: bool
) -> dict[str, Any]:
    """Return DeepSpeed's configuration, ready for JSON.

    Args:
        zero: the strategy.
        batch: the solved batch equation.
        clip_norm: largest global gradient norm; 0 turns clipping off.
        optimizer: AdamW's numbers; the rate is the peak, which each step overwrites.
        precision: what forward and backward compute in.
        native_adam: DeepSpeed's compiled Adam instead of torch's.
    """
    ours = {
        "train_batch_size": batch.global_,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
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
        "checkpoint": {"tag_validation": "Fail"},
        "wall_clock_breakdown": False,
    }
    if zero.uses_nvme:
        ours["aio"] = {
            "block_size": 1048576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
        }
    return merged(ours, zero.deepspeed)


def _optimizer(optimizer: AdamW, *, native_adam: bool) -> dict[str, Any]:
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
    if not isinstance(precision, Fp16):
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
        config["offload_optimizer"] = _place(zero, zero.offload_optimizer, buffer_count=4)
    if zero.offload_parameters != "none":
        config["offload_param"] = _place(zero, zero.offload_parameters, buffer_count=zero.nvme_buffer_count)
        if zero.offload_parameters == "nvme":
            config["offload_param"] |= {"buffer_size": zero.nvme_buffer_size, "max_in_cpu": zero.max_parameters_in_ram}
    return config


def _place(zero: Zero, device: str, *, buffer_count: int) -> dict[str, Any]:
    place: dict[str, Any] = {"device": device, "pin_memory": zero.pin_memory}
    if device == "nvme":
        place |= {"nvme_path": zero.nvme_path, "buffer_count": buffer_count}
    return place
