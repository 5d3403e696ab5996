"""DeepSpeed's own configuration keys: which exist, and which belong to an option of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

DEEPSPEED_OPTION = "parallel.deepspeed"

FREE_KEYS = frozenset(
    [
        "aio",
        "comms_logger",
        "communication_data_type",
        "compile",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_optimization",
    ]
)
"""Top-level keys a user may pass."""

OWNED_KEYS: Mapping[str, str] = {
    "activation_checkpointing": "activation",
    "bf16": "precision",
    "bfloat16": "precision",
    "checkpoint": "checkpoint.every",
    "fp16": "precision",
    "gradient_accumulation_steps": "job.gradient_accumulation_steps",
    "gradient_clipping": "job.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "torch_autocast": "precision",
    "train_batch_size": "job.global_batch",
    "train_micro_batch_size_per_gpu": "job.micro_batch",
    "comet": "tracker",
    "csv_monitor": "tracker",
    "tensorboard": "tracker",
    "wandb": "tracker",
    "zero_allow_untested_optimizer": "optimizer.implementation",
    "zero_force_ds_cpu_optimizer": "optimizer.implementation",
}
"""Top-level keys that an option of ours renders, and that option."""

FIXED_KEYS = frozenset(
    [
        "autotuning",
        "data_efficiency",
        "datastates_ckpt",
        "dataloader_drop_last",
        "expert_parallel",
        "gradient_allreduce_op",
        "hybrid_engine",
        "managed_gradient_accumulation",
        "pipeline",
        "tensor_parallel",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "weight_quantization",
    ]
)
"""Top-level keys that are rejected: unused, or they break data feeding or token weights."""

FREE_ZERO_KEYS = frozenset(
    [
        "allgather_partitions",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "override_module_apply",
        "parameter_alignment",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_allgather_sequential",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)
"""Keys of ``zero_optimization`` a user may pass."""

OWNED_ZERO_KEYS: Mapping[str, str] = {
    "allgather_bucket_size": "parallel.allgather_bucket_size",
    "contiguous_gradients": "parallel.contiguous_gradients",
    "cpu_offload": "parallel.offload_optimizer",
    "cpu_offload_param": "parallel.offload_parameters",
    "cpu_offload_use_pin_memory": "parallel.pin_memory",
    "offload_optimizer": "parallel.offload_optimizer",
    "offload_param": "parallel.offload_parameters",
    "overlap_comm": "parallel.overlap_comm",
    "reduce_bucket_size": "parallel.reduce_bucket_size",
    "stage": "parallel.stage",
    "stage3_max_live_parameters": "parallel.max_live_parameters",
    "stage3_param_persistence_threshold": "parallel.persistence_threshold",
    "stage3_prefetch_bucket_size": "parallel.prefetch_bucket_size",
    "sub_group_size": "parallel.sub_group_size",
}
"""Keys of ``zero_optimization`` that a field of ``parallel`` renders, and that field."""

FIXED_ZERO_KEYS = frozenset(
    [
        "compute_grad_norm",
        "elastic_checkpoint",
        "legacy_stage1",
        "load_from_fp32_weights",
        "pipeline_loading_checkpoint",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "zenflow",
    ]
)
"""Keys of ``zero_optimization`` that are rejected.

DeepSpeed dropped them, they hide the gradient norm, or they are about checkpoints, which it does not write here."""

_REASONS: Mapping[str, str] = {
    "zenflow": "it updates some weights late and keeps state that checkpoints do not hold",
    **dict.fromkeys(
        (
            "datastates_ckpt",
            "load_from_fp32_weights",
            "pipeline_loading_checkpoint",
            "stage3_gather_16bit_weights_on_model_save",
        ),
        "the launcher writes checkpoints itself",
    ),
}
"""Why some of these keys are rejected."""


def validate_raw_keys(raw: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield an error for each key that DeepSpeed ignores or that contradicts an option."""
    yield from _validate_level(raw, DEEPSPEED_OPTION, free=FREE_KEYS, owned=OWNED_KEYS, fixed=FIXED_KEYS)
    zero = raw.get("zero_optimization", {})
    path = f"{DEEPSPEED_OPTION}.zero_optimization"
    if isinstance(zero, Mapping):
        yield from _validate_level(zero, path, free=FREE_ZERO_KEYS, owned=OWNED_ZERO_KEYS, fixed=FIXED_ZERO_KEYS)
    else:
        yield ConfigError(path, zero, why="is not a mapping", fix="write it as {key: value}")


def _validate_level(
    raw: Mapping[str, Any],
    path: str,
    *,
    free: frozenset[str],
    owned: Mapping[str, str],
    fixed: frozenset[str],
) -> Iterator[ConfigError]:
    for key, value in raw.items():
        option = f"{path}.{key}"
        if key in owned:
            yield ConfigError(option, value, why=f"{owned[key]} already sets it", fix=f"set {owned[key]} instead")
        elif key in fixed:
            yield ConfigError(option, value, why=_REASONS.get(str(key), "the launcher sets it"), fix=f"remove {option}")
        elif key not in free:
            hint = did_you_mean(str(key), [*free, *owned])
            yield ConfigError(option, why="is not a DeepSpeed key, so DeepSpeed would ignore it", fix=hint)


def merge_raw_keys(ours: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``ours`` with ``raw`` laid over it, mapping by mapping."""
    result = dict(ours)
    for key, value in raw.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge_raw_keys(below, value)
        result[key] = value
    return result
