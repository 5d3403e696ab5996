"""Base of DeepSpeed's engines: environment, process group, Adam, steps, checkpoints."""

from __future__ import annotations

import enum
import logging
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.config.optimizer import AdamW
from launcher.engines.base import Engine, StepResult
from launcher.engines.checkpoint_io import explain_read_errors, load_rng, save_rng
from launcher.engines.distributed import (
    all_ranks_agree,
    choose_device,
    disconnect,
    group_timeout,
    join_group,
    ranks_with_nonfinite,
    sum_over_ranks,
)
from launcher.engines.model_state import deepspeed_state_bytes
from launcher.engines.optimizer import decay_groups
from launcher.errors import EXIT_BAD_INPUT, EnvironmentProblem, JobError
from launcher.protocol.native_ops import is_built, ops_folder, path_with_ninja, read_build_outcome
from launcher.utils.build_cache import quote_torch_library_path

if TYPE_CHECKING:
    from launcher.checkpoint.tensors import Shard, StoredState
    from launcher.config.parallel.zero import Zero
    from launcher.engines.context import Context
    from launcher.profiling.performance import StepClock
    from launcher.protocol.plan import StateBytes


_SETUPTOOLS_MESSAGES = ("Distutils was imported before Setuptools", "Setuptools is replacing distutils")
"""Warnings of setuptools when torch imports it to load an operator.
They appear if something imported distutils before."""


_TAG = "deepspeed"
"""Tag of its checkpoints."""


class DeepSpeedEngineBase(Engine):
    """An engine around one of DeepSpeed's own: its process group, its checkpoints, its memory."""

    _engine: Any

    def __init__(self, context: Context, clock: StepClock) -> None:
        prepare_environment(context)
        import deepspeed  # noqa: F401  (after its environment, before its process group)

        silence_deepspeed_log()
        self._clock, self._context = clock, context
        self.device = choose_device(context.local_rank)
        connect_deepspeed(context, device=self.device)
        allow_fp16(self.device)

    def _initialize(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        """Build DeepSpeed's engine around a model."""
        import deepspeed

        self._engine, _, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=decay_groups(model, weight_decay=self._context.run.optimizer.weight_decay),
            config=dict(config),
            dist_init_required=False,
        )

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

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's checkpoint and this rank's random generators.

        The checkpoint has weights, optimizer partitions and the loss scale.
        """
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        save_rng(folder, rank=self._context.rank, device=self.device)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote at the same world size, stages and cut.

        Raises:
            JobError: the folder holds no checkpoint of DeepSpeed, or objects that could run code; exit code 65.
        """
        with explain_read_errors(folder / _TAG), deepspeed_tensors_only():
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if loaded is None:
            raise JobError(f"{folder} does not hold a checkpoint that DeepSpeed reads", exit_code=EXIT_BAD_INPUT)
        load_rng(folder, rank=self._context.rank, device=self.device)

    def shards(self) -> list[Shard]:
        """Raise: ``save`` and ``load`` use DeepSpeed's own files."""
        raise NotImplementedError

    def load_shards(self, source: StoredState) -> None:
        """Raise: ``save`` and ``load`` use DeepSpeed's own files."""
        raise NotImplementedError

    def scalars(self) -> dict[str, float]:
        """Raise: ``save`` and ``load`` use DeepSpeed's own files."""
        raise NotImplementedError

    def restore_scalars(self, scalars: Mapping[str, float]) -> None:
        """Raise: ``save`` and ``load`` use DeepSpeed's own files."""
        raise NotImplementedError

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


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """Return a member of an enumeration, in place of ``getattr`` in a pickle.

    Python 3.11.0 to 3.11.3 pickle members by ``getattr``.

    Raises:
        pickle.UnpicklingError: an attribute of anything else is asked for.
    """
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError("Unsupported GLOBAL getattr of what is no enumeration")
    return kind[name]


@contextmanager
def deepspeed_tensors_only() -> Iterator[None]:
    """Make DeepSpeed's checkpoint loader load with ``weights_only``.

    It asks torch for full unpickling.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    full = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        return full(*arguments, **{**options, "weights_only": True})

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (_enum_member, "builtins.getattr")]
    with torch.serialization.safe_globals(allowed):
        torch.load = load
        try:
            yield
        finally:
            torch.load = full
