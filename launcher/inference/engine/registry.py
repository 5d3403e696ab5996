"""The engine of each ``job.engine``, imported when it is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from launcher.inference.engine.base import InferenceEngine
from launcher.inference.engine.echo_engine import EchoEngine
from launcher.models.pretrained import transformers_config, transformers_folder

if TYPE_CHECKING:
    from launcher.config.job.generating import GeneratingJob
    from launcher.config.run import Run

_MAX_MODEL_LEN, _VOCAB_SIZE = 2048, 1 << 20
"""Of an echo of a model whose sizes are not known."""


def make_engine(run: Run, job: GeneratingJob, *, heartbeat: Callable[[], None], local_rank: int = 0) -> InferenceEngine:
    """Return an engine with the whole model, built and not warmed up.

    Raises:
        ConfigError: it cannot be built as asked.
        EnvironmentProblem: weights cannot be fetched.
    """
    if job.engine == "echo":
        shape = run.model.shape()
        max_model_len, vocab_size = (
            (shape.max_position_embeddings, shape.vocab_size) if shape else (_MAX_MODEL_LEN, _VOCAB_SIZE)
        )
        return EchoEngine(limits=job.limits, max_model_len=max_model_len, vocab_size=vocab_size, step_s=job.echo_step_s)
    if job.engine == "vllm":
        return _make_vllm_engine(run, job, heartbeat=heartbeat)
    if job.engine == "transformers":
        from launcher.inference.engine.transformers_engine import make_transformers_engine

        return make_transformers_engine(run, limits=job.limits, heartbeat=heartbeat, local_rank=local_rank)
    from launcher.inference.engine.paged_engine import make_paged_engine

    return make_paged_engine(
        run,
        limits=job.limits,
        rank=0,
        world_size=1,
        heartbeat=heartbeat,
        local_rank=local_rank,
        adapters=job.adapters,
    )


def _make_vllm_engine(run: Run, job: GeneratingJob, *, heartbeat: Callable[[], None]) -> InferenceEngine:
    from launcher.inference.engine.vllm_engine import VllmEngine, VllmServer

    folder = transformers_folder(run.model, dtype=run.precision.compute, heartbeat=heartbeat)
    assert folder is not None, "random weights are refused before anything starts"
    config = transformers_config(run.model).get_text_config()
    server = VllmServer(run, job, name=run.model.name)
    server.start(str(folder))
    sizes = {"max_model_len": config.max_position_embeddings, "vocab_size": config.vocab_size}
    return VllmEngine(server, name=run.model.name, limits=job.limits, **sizes, heartbeat=heartbeat)
