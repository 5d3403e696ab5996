"""What of a run the generation engine cannot do, told while it is planned: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import ConfigError

if TYPE_CHECKING:
    from launcher.config import Run


def refusals(run: Run, *, world_size: int) -> Iterator[ConfigError]:
    """Yield why ``job.engine=slots`` cannot compute what a run asks for.

    Args:
        run: of a job that generates.
        world_size: ranks that hold one model between them.
    """
    if run.attention.kind != "sdpa":
        why = "job.engine=slots computes attention over pages by kernels of its own"
        yield ConfigError("attention", run.attention.kind, why=why, fix="set attention=sdpa")
    if run.compile.kind != "false":
        why = "job.engine=slots has compiled kernels of its own, and shapes that change with every step"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set compile=false")
    if run.precision.kind == "fp8":
        why = "job.engine=slots has no 8-bit products"
        yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=bf16")
    if world_size > 1 and (run.parallel.kind != "fsdp" or run.parallel.degrees(world_size).tensor != world_size):
        why = f"job.engine=slots spreads a model over {world_size} ranks by slicing its matrices"
        fix = f"set parallel=tensor parallel.tensor={world_size}"
        yield ConfigError("parallel", run.parallel.kind, why=why, fix=fix)
