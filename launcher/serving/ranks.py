"""All ranks of a run as one engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.engines.distributed import choose_device, connect, disconnect
from launcher.serving.make import follow, make_generator

if TYPE_CHECKING:
    from launcher.context import Context
    from launcher.serving.base import Generator
    from launcher.serving.limits import Limits


def engine_of_ranks(context: Context, *, limits: Limits, beat: Callable[[], None]) -> Generator | None:
    """Return the engine on the first rank; the others compute in here until it is closed, and get nothing.

    Args:
        context: of this rank, which joins the others and, where it is not the first, leaves them again.
        limits: how much at a time.
        beat: called while the model is built, and by those that wait for something to compute.

    Raises:
        ConfigError: the engine cannot hold this model exactly, or cannot serve it with the rest of the run.
        EnvironmentProblem: weights cannot be fetched.
    """
    run, rank, world_size, local_rank = context.run, context.rank, context.world_size, context.local_rank
    connect(context, choose_device(local_rank))
    if context.is_main:
        return make_generator(run, limits=limits, rank=rank, world_size=world_size, beat=beat, local_rank=local_rank)
    sizes = {"rank": rank, "world_size": world_size, "local_rank": local_rank}
    follow(run, limits=limits, beat=beat, profiler=context.profiler, **sizes)
    disconnect()
    return None
