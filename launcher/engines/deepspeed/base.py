"""Base of DeepSpeed's engines: environment, process group, Adam, steps, checkpoints."""

from __future__ import annotations

import logging
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from launcher.config.optimizer import AdamW
from launcher.engines.base import Engine, StepResult
from launcher.engines.distributed import (
    all_ranks_agree,
    choose_device,
    disconnect,
    group_timeout,
    join_group,
    ranks_with_nonfinite,
    sum_over_ranks,
)
from launcher.engines.kept_zeros import mask_in_backward
from launcher.engines.model_state import deepspeed_state_bytes
from launcher.engines.optimizer import check_groups, parameter_groups
from launcher.engines.state import fill_tensors, persistent_buffers, restore_rng, rng_tensors, shards_of
from launcher.errors import EnvironmentProblem
from launcher.protocol.native_ops import is_built, ops_folder, path_with_ninja, read_build_outcome
from launcher.utils.build_cache import quote_torch_library_path

if TYPE_CHECKING:
    from launcher.checkpoint.tensors import Shard, StoredState
    from launcher.config.parallel.zero import Zero
    from launcher.engines.context import Context
    from launcher.engines.deepspeed.masters import MasterState
    from launcher.profiling.performance import StepClock
    from launcher.protocol.plan import StateBytes


_SETUPTOOLS_MESSAGES = ("Distutils was imported before Setuptools", "Setuptools is replacing distutils")
"""Warnings of setuptools when torch imports it to load an operator.
They appear if something imported distutils before."""


class DeepSpeedEngineBase(Engine):
    """An engine around one of DeepSpeed's own: its process group, its checkpoints, its memory."""

    _engine: Any

    def __init__(self, context: Context, clock: StepClock) -> None:
        prepare_environment(context)
        from launcher.utils import deepspeed_library  # noqa: F401  (after its environment, before its process group)

        silence_deepspeed_log()
        self._clock, self._context = clock, context
        self.device = choose_device(context.local_rank)
        connect_deepspeed(context, device=self.device)
        allow_fp16(self.device)

    def _initialize(self, model: nn.Module, config: Mapping[str, Any], *, names: Mapping[nn.Parameter, str]) -> None:
        """Build DeepSpeed's engine around a model.

        Args:
            model: all of it, or a stage.
            config: DeepSpeed's.
            names: of the parameters of ``model`` in the whole model.
        """
        import deepspeed

        options = self._context.run.optimizer
        check_groups(options, names, device=self.device)
        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(names, options),
            config=dict(config),
            dist_init_required=False,
        )
        undo_trial_update(self._engine.optimizer)

    def _keep_zeros(self) -> None:
        """Keep the zeros of linear layers, where the run does; call it once DeepSpeed has the model."""
        if self._context.run.sparsity.keep:
            mask_in_backward(self.linear_matrices().values())

    def _step_result(self, own_sum: float, *, tokens: int, norm: float | None, preempted: bool) -> StepResult:
        """Return the result of a step that DeepSpeed has taken, the same on every rank.

        Args:
            own_sum: the loss summed over this rank's tokens.
            tokens: with a label in the global batch.
            norm: of the gradient, where DeepSpeed computes none.
            preempted: whether this rank is preempted.
        """
        skipped = not self._engine.was_step_applied()
        total, num_preempted = sum_over_ranks([own_sum, float(preempted)], device=self.device)
        loss = total / tokens if tokens else math.nan
        if norm is None and not skipped:
            norm = float(self._engine.get_global_grad_norm())
        return StepResult(
            loss=loss,
            grad_norm=None if skipped else norm,
            tokens=tokens,
            skipped=skipped,
            nonfinite_ranks=() if math.isfinite(loss) else ranks_with_nonfinite(own_sum, device=self.device),
            preempted=num_preempted > 0,
        )

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine."""
        return self._engine

    def state_bytes(self) -> StateBytes:
        """Return the bytes in memory: partitions as such, without those on NVMe."""
        return deepspeed_state_bytes(self._engine, device=self.device)

    def shards(self) -> list[Shard]:
        """Return this rank's parts of master weights and moments, buffers, and its generators."""
        return [*self._master_state().shards(), *shards_of(self._buffers() | rng_tensors(self.device))]

    def load_shards(self, source: StoredState) -> None:
        """Fill master weights and moments in place; the weights of passes follow."""
        self._master_state().load(source, heartbeat=lambda: self._context.heartbeat.update("load"))
        fill_tensors(self._buffers(), source)
        restore_rng(source, device=self.device)

    def scalars(self) -> dict[str, float]:
        """Return the loss scale."""
        return read_loss_scale(self._engine.optimizer)

    def restore_scalars(self, scalars: Mapping[str, float]) -> None:
        """Set the loss scale."""
        set_loss_scale(self._engine.optimizer, scalars)

    def _buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers that this rank has, and that checkpoints hold."""
        if self._context.run.lora is not None:
            return {}
        return {name: buffer for name, buffer in persistent_buffers(self._named_model()).items() if not buffer.is_meta}

    def _named_model(self) -> nn.Module:
        """Return the model, or this rank's part of it, under the names of the whole one."""
        return self.module

    @abstractmethod
    def _master_state(self) -> MasterState:
        """Return access to master weights and moments by the names of the whole model."""

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks, and the process group."""
        self._engine.destroy()
        disconnect()


def prepare_environment(context: Context) -> None:
    """Set the variables that only DeepSpeed's launcher would set.

    Call it before DeepSpeed is imported.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder()))
    os.environ["PATH"] = path_with_ninja()
    os.environ.setdefault("LOCAL_SIZE", str(context.world_size))
    os.environ.setdefault("CROSS_SIZE", "1")
    os.environ.setdefault("CROSS_RANK", "0")


def silence_deepspeed_log() -> None:
    """Reduce DeepSpeed's log to its warnings, without torch's messages to DeepSpeed's authors."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)
    for message in _SETUPTOOLS_MESSAGES:
        warnings.filterwarnings("ignore", message=message)


def connect_deepspeed(context: Context, *, device: torch.device) -> None:
    """Join the process group of the run, through DeepSpeed.

    On a CPU DeepSpeed would first compile its shared-memory operator, which serves tensor-parallel inference only, and
    leave 66 MiB of it a rank in ``/dev/shm`` when the run ends. Its table of operators says that there is none.
    """
    import deepspeed

    quote_torch_library_path()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    join_group(context, device, device_id=None)  # DeepSpeed takes a group that is there
    deepspeed.init_distributed(backend, timeout=group_timeout(context), verbose=False)


def allow_fp16(device: torch.device) -> None:
    """Let fp16 run on CPUs without fp16 instructions: slowly, with the same numbers.

    DeepSpeed refuses it there, and with it every trial of an fp16 run on a machine without a GPU.
    """
    from deepspeed.accelerator import get_accelerator

    if device.type == "cpu":
        get_accelerator().is_fp16_supported = lambda: True


def undo_trial_update(optimizer: Any) -> None:
    """Undo the update by which DeepSpeed creates Adam's state without ZeRO.

    Its wrappers of half precision do so. The update counts as a step, which makes all that follow too small or too
    large, and decays the master weights.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        optimizer.optimizer.state.clear()
        optimizer.refresh_fp32_params()


def read_parameters_once() -> None:
    """Read a parameter once from NVMe where one call of DeepSpeed names it twice.

    Its prefetching names the last block's twice, for the forward and for the backward pass, and would fail: "already
    assigned swap buffer".
    """
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper as Swapper

    original = Swapper.swap_in
    if getattr(original, "skips_repeated", False):
        return

    def swap_in(self: Any, params: Sequence[nn.Parameter], *arguments: Any, **options: Any) -> None:
        original(self, list(dict.fromkeys(params)), *arguments, **options)

    swap_in.skips_repeated = True  # type: ignore[attr-defined]
    Swapper.swap_in = swap_in


def choose_native_adam(context: Context, zero: Zero, *, device: torch.device) -> bool:
    """Return whether DeepSpeed's Adam runs, the same on every rank; rank 0 prints the reason.

    Raises:
        EnvironmentProblem: the run needs an operator that is not built.
    """
    optimizer = context.run.optimizer
    assert isinstance(optimizer, AdamW), "the plan refuses others"
    lacking = [name for name in zero.native_ops(optimizer).needed if not is_built(name)]
    if lacking:
        names = " ".join(lacking)
        raise EnvironmentProblem(f"DeepSpeed's {names} is not built here; run: python -m launcher.ops {names}")
    adam = "fused_adam" if zero.offload_optimizer == "none" else "cpu_adam"
    wanted = zero.wants_native_adam(optimizer)
    native = wanted and all_ranks_agree(is_built(adam), device=device)
    if context.is_main and optimizer.implementation == "auto":
        print(f"optimizer: {_reason(adam, wanted=wanted, native=native)}", flush=True)
    return native


def _reason(adam: str, *, wanted: bool, native: bool) -> str:
    if native:
        return f"DeepSpeed's {adam}"
    if not wanted:
        return "torch's fused AdamW"
    outcome = read_build_outcome(ops_folder(), adam)
    why = outcome.why if outcome and outcome.why else "it is not built on every host"
    return f"torch's fused AdamW in place of DeepSpeed's {adam}: {why}"


def read_loss_scale(optimizer: Any) -> dict[str, float]:
    """Return the loss scale of DeepSpeed's optimizer in the form of ``LossScale.state``."""
    scale = _dynamic_loss_scale(optimizer)
    if scale is None:
        return {}
    # wrapped optimizers without ZeRO halve the scale at every overflow
    hysteresis = getattr(scale, "cur_hysteresis", 1)
    good_steps = scale.cur_iter - scale.last_overflow_iter - 1
    return {"value": scale.cur_scale, "hysteresis": hysteresis, "good_steps": good_steps}


def set_loss_scale(optimizer: Any, state: Mapping[str, float]) -> None:
    """Continue from the loss scale of any engine; without fp16 on both sides do nothing."""
    scale = _dynamic_loss_scale(optimizer)
    if scale is None or not state:
        return
    scale.cur_scale = state["value"]
    scale.cur_iter, scale.last_overflow_iter = int(state["good_steps"]), -1
    if hasattr(scale, "cur_hysteresis"):
        scale.cur_hysteresis = int(state["hysteresis"])


def _dynamic_loss_scale(optimizer: Any) -> Any:
    """Return where an optimizer keeps its loss scale: with ZeRO a scaler, else a record."""
    scaler = getattr(optimizer, "loss_scaler", None)
    record = getattr(optimizer, "loss_scale_config", None)
    if scaler is not None:
        return scaler if scaler.dynamic else None
    return record if record is not None and record.dynamic_loss_scale else None
