"""Which engine a rank or a replica builds: the run's own, or the one that needs no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.serving.base import Generator
from launcher.serving.echo import Echo

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.jobs.generating import GeneratingJob

_CONTEXT, _VOCAB_SIZE = 2048, 1 << 20
"""Of an echo of a model whose sizes are not known."""


def chosen_generator(run: Run, job: GeneratingJob, *, beat: Callable[[], None], local_rank: int = 0) -> Generator:
    """Return an engine with the whole model, built and not warmed up.

    Raises:
        ConfigError: it cannot be built as asked.
        EnvironmentProblem: weights cannot be fetched.
    """
    if job.engine == "echo":
        shape = run.model.shape()
        context, vocab_size = (shape.context, shape.vocab_size) if shape else (_CONTEXT, _VOCAB_SIZE)
        return Echo(limits=job.limits, context=context, vocab_size=vocab_size, step_s=job.echo_step_s)
    if job.engine == "vllm":
        return _vllm(run, job, beat=beat)
    if job.engine == "transformers":
        from launcher.serving.make_theirs import make_theirs

        return make_theirs(run, limits=job.limits, beat=beat, local_rank=local_rank)
    from launcher.serving.make import make_generator

    return make_generator(run, limits=job.limits, rank=0, world_size=1, beat=beat, local_rank=local_rank)


def _vllm(run: Run, job: GeneratingJob, *, beat: Callable[[], None]) -> Generator:
    from launcher.serving.vllm_engine import VllmEngine
    from launcher.serving.vllm_server import VllmServer

    folder = run.model.weights_folder(beat=beat)
    assert folder is not None, "random weights are refused before anything starts"
    config = run.model.transformers_config().get_text_config()
    server = VllmServer(run, job, name=run.model.name)
    server.start(str(folder))
    sizes = {"context": config.max_position_embeddings, "vocab_size": config.vocab_size}
    return VllmEngine(server, name=run.model.name, limits=job.limits, **sizes, beat=beat)
