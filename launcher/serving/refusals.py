"""What of a run the generation engine cannot do, told while it is planned: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.models.attending import other_layers, windows
from launcher.models.installed import attention_marks
from launcher.parallel.pipeline import Pipeline

if TYPE_CHECKING:
    from launcher.config import Run


def refusals(run: Run, *, world_size: int, engine: str = "slots") -> Iterator[ConfigError]:
    """Yield why an engine cannot compute what a run asks for.

    Args:
        run: of a job that generates.
        world_size: ranks that hold one model between them.
        engine: ``slots`` or ``transformers``.
    """
    if engine == "slots" and run.attention.kind != "sdpa":
        why = "job.engine=slots computes attention over pages by kernels of its own"
        yield ConfigError("attention", run.attention.kind, why=why, fix="set attention=sdpa")
    if engine == "slots" and (why_not := _unheld(run)) is not None:
        yield unheld(str(run.model.family()), why_not)
    if engine == "transformers" and run.attention.kind == "flex":
        why = "Transformers' continuous batching knows eager, sdpa and flash"
        yield ConfigError("attention", run.attention.kind, why=why, fix="set attention=sdpa")
    if run.compile.kind != "false":
        why = f"shapes change with every step of job.engine={engine}"
        yield ConfigError("compile", run.compile.kind, why=why, fix="set compile=false")
    if run.precision.kind == "fp8":
        why = f"job.engine={engine} has no 8-bit products"
        yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=bf16")
    degrees = run.parallel.degrees(world_size)
    spread = {"fsdp": degrees.tensor, "pipeline": degrees.pipeline}.get(run.parallel.kind)
    if world_size > 1 and spread != world_size:
        why = f"job.engine=slots spreads a model over {world_size} ranks as slices of its matrices, or as stages"
        fix = f"set parallel=tensor parallel.tensor={world_size}, or parallel=pipeline parallel.stages={world_size}"
        yield ConfigError("parallel", run.parallel.kind, why=why, fix=fix)
    if isinstance(run.parallel, Pipeline):
        yield from _unused_of_pipelines(run.parallel)


def _unheld(run: Run) -> str | None:
    """Return why pages cannot hold a model, as far as files tell; the rank compares results besides."""
    config = run.model.stored_config()
    marks = attention_marks(str(config.get("model_type"))) if config is not None else None
    if config is None or marks is None:
        return None
    if others := [*other_layers(config), *(key for key, _ in windows(config))]:
        return f"keeps other things than keys and values of all tokens ({', '.join(others)})"
    if marks.is_stateful:
        return "keeps other things than keys and values of all tokens (a state)"
    return (
        None if marks.attention_backend and marks.sdpa else "computes attention by code that the engine cannot replace"
    )


def unheld(family: str, why: str) -> ConfigError:
    """Return the refusal of a model of that family."""
    why = f"{family} {why}, which pages cannot hold exactly"
    fix = "set job.engine=transformers or job.engine=vllm on a GPU, or choose a model with plain causal attention"
    return ConfigError("job.engine", "slots", why=why, fix=fix)


def _unused_of_pipelines(parallel: Pipeline) -> Iterator[ConfigError]:
    """Yield options that say how a pipeline trains, and are not what they are by default."""
    usual = Pipeline(stages=parallel.stages)
    for name in ("schedule", "micro_batches", "chunks", "balance", "data"):
        value = getattr(parallel, name)
        if value != getattr(usual, name):
            why = "an engine sends the parts of a step through its stages as they come; this is about training"
            yield parallel.refuse(name, why, f"leave parallel.{name} out")
