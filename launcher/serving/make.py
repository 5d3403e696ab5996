"""Which engine a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.serving.base import Generator
from launcher.serving.limits import Limits

if TYPE_CHECKING:
    from launcher.config import Run


def make_generator(run: Run, *, limits: Limits, rank: int, world_size: int, beat: Callable[[str], None]) -> Generator:
    """Stand-in until the engine's own: only ``echo``."""
    from launcher.serving.echo import Echo

    shape = run.model.shape()
    context, vocab = (shape.context, shape.vocab_size) if shape else (2048, 1 << 20)
    return Echo(limits=limits, context=context, vocab_size=vocab, step_s=getattr(run.job, "echo_step_s", 0.0))
