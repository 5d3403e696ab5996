"""Engines carry out a strategy on a rank: torch, or DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.engines.base import Engine
    from launcher.training.clock import Clock


def make_engine(context: Context, clock: Clock) -> Engine:
    """Connect the ranks, build the model and return the engine that the run's strategy asks for."""
    if context.run.parallel.engine == "deepspeed":
        from launcher.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(context, clock)
    from launcher.engines.torch import TorchEngine

    return TorchEngine(context, clock)
