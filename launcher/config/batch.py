"""The batch equation: micro x accumulation x data-parallel size = global."""

from __future__ import annotations

from launcher.errors import ConfigError
from launcher.protocol.plan import Batch


def solve_batch(
    *, micro: int, global_: int | None, accumulation: int | None, data_parallel: int, usual: int = 1
) -> Batch:
    """Derive what the user left out; ``usual`` is the accumulation where nothing says anything about it.

    Raises:
        ConfigError: the numbers given do not multiply out; the message holds the arithmetic and the nearest fit.
    """
    if global_ is None:
        return Batch(micro=micro, accumulation=accumulation or usual, data_parallel=data_parallel)
    one_pass = micro * data_parallel
    if accumulation is not None and one_pass * accumulation != global_:
        raise ConfigError(
            "job.global_batch",
            global_,
            why=f"micro {micro} × accum {accumulation} × dp {data_parallel} = {one_pass * accumulation}",
            fix=f"set job.global_batch={one_pass * accumulation} or leave out job.gradient_accumulation_steps",
        )
    if global_ % one_pass:
        nearest = sorted({max(one_pass, global_ // one_pass * one_pass), (global_ // one_pass + 1) * one_pass})
        choices = " or ".join(f"job.global_batch={value}" for value in nearest)
        raise ConfigError(
            "job.global_batch",
            global_,
            why=f"micro {micro} × dp {data_parallel} = {one_pass} does not divide {global_}",
            fix=f"set {choices}",
        )
    return Batch(micro=micro, accumulation=global_ // one_pass, data_parallel=data_parallel)
