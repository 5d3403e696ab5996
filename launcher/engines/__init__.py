"""Engines carry out a strategy on a rank: torch, or DeepSpeed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.engines.base import Engine
    from launcher.training.clock import Clock

ENGINES: dict[str, str] = {
    "single": "launcher.engines.torch:TorchEngine",
    "ddp": "launcher.engines.torch:TorchEngine",
    "fsdp": "launcher.engines.torch:TorchEngine",
    "zero": "launcher.engines.deepspeed:DeepSpeedEngine",
    "pipeline": "launcher.engines.pipeline:PipelineEngine",
    "deepspeed_pipeline": "launcher.engines.deepspeed_pipeline:DeepSpeedPipelineEngine",
}
"""The engine of each kind of strategy."""


def make_engine(context: Context, clock: Clock) -> Engine:
    """Connect the ranks, build the model and return the engine that the run's strategy asks for."""
    module, _, name = ENGINES[context.run.parallel.kind].partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(context, clock)
    return engine
