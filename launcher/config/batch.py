"""The batch equation: micro x accumulation x data-parallel size = global."""

from __future__ import annotations

from launcher.errors import ConfigError
from launcher.protocol.plan import Batch


def solve_batch(
    *,
    micro_batch: int,
    global_batch: int | None,
    gradient_accumulation_steps: int | None,
    data_parallel: int,
    default: int = 1,
) -> Batch:
    """Derive the batch sizes that are left out.

    ``default`` is the number of accumulation steps if no option sets it.

    Raises:
        ConfigError: the numbers given do not multiply out; the message holds the arithmetic and the nearest fit.
    """
    if global_batch is None:
        return Batch(
            micro_batch=micro_batch,
            gradient_accumulation_steps=gradient_accumulation_steps or default,
            data_parallel=data_parallel,
        )
    one_pass = micro_batch * data_parallel
    if gradient_accumulation_steps is not None and one_pass * gradient_accumulation_steps != global_batch:
        product = one_pass * gradient_accumulation_steps
        raise ConfigError(
            "job.global_batch",
            global_batch,
            why=f"micro {micro_batch} × accum {gradient_accumulation_steps} × dp {data_parallel} = {product}",
            fix=f"set job.global_batch={product} or leave out job.gradient_accumulation_steps",
        )
    if global_batch % one_pass:
        nearest = sorted(
            {max(one_pass, global_batch // one_pass * one_pass), (global_batch // one_pass + 1) * one_pass}
        )
        choices = " or ".join(f"job.global_batch={value}" for value in nearest)
        raise ConfigError(
            "job.global_batch",
            global_batch,
            why=f"micro {micro_batch} × dp {data_parallel} = {one_pass} does not divide {global_batch}",
            fix=f"set {choices}",
        )
    return Batch(
        micro_batch=micro_batch, gradient_accumulation_steps=global_batch // one_pass, data_parallel=data_parallel
    )
