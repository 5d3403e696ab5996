"""DeepSpeed's environment on a rank: where its operators are, and which of them this run does without."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING

from launcher.compile import quote_torch_libraries
from launcher.engines.distributed import all_ranks_agree, group_timeout, join_group
from launcher.errors import EnvironmentProblem
from launcher.ops.build import path_with_ninja
from launcher.ops.folder import is_built, ops_folder
from launcher.ops.record import read_outcome

if TYPE_CHECKING:
    import torch

    from launcher.context import Context
    from launcher.parallel.zero import Zero


def prepare_environment(context: Context) -> None:
    """Set what DeepSpeed reads from the environment and its own launcher alone would set; before importing it."""
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder()))
    os.environ["PATH"] = path_with_ninja()
    os.environ.setdefault("LOCAL_SIZE", str(context.world_size))
    os.environ.setdefault("CROSS_SIZE", "1")
    os.environ.setdefault("CROSS_RANK", "0")


def quiet() -> None:
    """Leave the warnings of DeepSpeed's log; drop what it tells of itself, and what torch tells DeepSpeed's authors."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated", category=FutureWarning)


def connect_deepspeed(context: Context, *, device: torch.device) -> None:
    """Join the process group of the run, through DeepSpeed.

    On a CPU DeepSpeed would first compile its shared-memory operator, which serves tensor-parallel inference only, and
    leave 66 MiB of it a rank in ``/dev/shm`` when the run ends. Its table of operators is told that there is none.
    """
    import deepspeed

    quote_torch_libraries()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    join_group(context, device, device_id=None)  # DeepSpeed takes a group that is there
    deepspeed.init_distributed(backend, timeout=group_timeout(context), verbose=False)


def allow_fp16(device: torch.device) -> None:
    """Let fp16 run on CPUs without instructions for it, as torch does: slowly, with the same numbers.

    DeepSpeed refuses it there, and with it every trial of an fp16 run on a machine without a GPU.
    """
    from deepspeed.accelerator import get_accelerator

    if device.type == "cpu":
        get_accelerator().is_fp16_supported = lambda: True


def take_native_adam(context: Context, zero: Zero, *, device: torch.device) -> bool:
    """Return whether DeepSpeed's own Adam runs, the same on every rank; rank 0 says what is taken and why.

    Raises:
        EnvironmentProblem: the run needs an operator that is not built.
    """
    optimizer = context.run.optimizer
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
    outcome = read_outcome(ops_folder(), adam)
    why = outcome.why if outcome and outcome.why else "it is not built on every host"
    return f"torch's fused AdamW in place of DeepSpeed's {adam}: {why}"
