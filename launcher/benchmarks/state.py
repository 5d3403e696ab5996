"""Optimiser steps of one strategy, and the bytes of model state that this rank holds in the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from launcher.benchmarks.batches import random_batches
from launcher.benchmarks.peak import PeakMemory
from launcher.engines import make_engine
from launcher.models.heap import keep_nothing_large
from launcher.training.clock import Clock

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.parallel.base import StateBytes
    from launcher.verification.fork import Answer


def hold_state(context: Context, *, warmup: int) -> Answer:
    """Build the run's model under its strategy, take steps, and return bytes by part, and those of the peak.

    Args:
        context: of this rank.
        warmup: steps before the one that is looked at; the first makes the moments, so there is one at least.
    """
    cuda = torch.cuda.is_available()
    keep_nothing_large()
    peak = PeakMemory(torch.device("cuda", context.local_rank) if cuda else torch.device("cpu"))
    held: list[StateBytes] = []
    clock = UpdateClock(context, cuda=cuda)
    with make_engine(context, clock) as engine:
        clock.before_update = lambda: held.append(engine.held())
        batches = random_batches(context)
        for _ in range(warmup + 1):
            result = engine.step(batches, lr=context.run.optimizer.lr)
            assert not result.skipped, "a step without an update"
        # parameters that DeepSpeed has partitioned are empty, and know their size
        num_params = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
        above = peak.above_before()
    last = held[-1]
    return {
        "num_params": num_params,
        "parameters_bytes": last.parameters,
        "gradients_bytes": last.gradients,
        "optimizer_bytes": last.optimizer,
        "host_bytes": last.host,
        "peak_bytes": above,
    }


class UpdateClock(Clock):
    """A clock by which one looks in between the backward pass and the update."""

    def __init__(self, context: Context, *, cuda: bool) -> None:
        super().__init__(context.heartbeat, cuda=cuda)
        self.before_update: Callable[[], None] = lambda: None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; look first where it is the update."""
        if name == "optimizer":
            self.before_update()
        with super().phase(name):
            yield
