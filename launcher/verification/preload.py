"""Importing once, before forking, what every case would import by itself: most of the seconds of a small case."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.context import Context

_ALWAYS = (
    "launcher.verification.take",
    "launcher.engines.torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.generation.utils",
    "transformers.integrations",
)
_DEEPSPEED = (
    "launcher.engines.deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.moe.layer",
    "torch._inductor.compile_fx",
)


def preload(context: Context, *, deepspeed: bool) -> None:
    """Import what the cases need, and lay the model out once; nothing here may touch a GPU, or no fork could.

    Args:
        context: of this rank in the run.
        deepspeed: whether some case is DeepSpeed's.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _import(_ALWAYS, context)
    if deepspeed:
        import torch

        from launcher.engines.native import prepare_environment

        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        prepare_environment(context)
        _import(_DEEPSPEED, context)
    from launcher.models.build import lay_out

    run = context.run
    lay_out(run.model, seed=run.job.seed, attention=run.attention, beat=lambda: context.heartbeat.beat("load"))


def _import(names: tuple[str, ...], context: Context) -> None:
    for name in names:
        context.heartbeat.beat("load")
        importlib.import_module(name)
