"""Tasks of lm-evaluation-harness at the evaluations of a training run."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.job.eval_tasks import TASK_METRICS
from launcher.errors import ConfigError
from launcher.models.tokenizer import load_transformers_tokenizer
from launcher.training.checkpointing import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from launcher.config.job.train import Train
    from launcher.engines.base import Engine
    from launcher.engines.context import Context
    from launcher.models.tokenizer import FastTokenizer


class TaskEvaluation:
    """Answers ``job.eval_tasks`` with the model as it is at a step.

    Args:
        job: that names the tasks.
        context: of this rank.
        tokenizer: of the data.

    Raises:
        ConfigError: a task is unknown or cannot be loaded, or the tokenizer is none that Transformers loads.
        EnvironmentProblem: the data of a task cannot be fetched.
    """

    def __init__(self, job: Train, context: Context, tokenizer: FastTokenizer | None) -> None:
        self._request, self._context, self._batch_size = job.task_request, context, job.micro_batch
        self._best = context.run.checkpoint.best_metric.partition(":")[2]
        if not job.eval_tasks:
            return
        from launcher.training.lm_eval_harness import check_tasks, make_task_manager

        assert tokenizer is not None, "a corpus has a tokenizer"
        self._manager = make_task_manager(self._request, num_ranks=context.world_size)
        check_tasks(self._request, self._manager)
        self._tokenizer = _as_in_a_checkpoint(context, tokenizer)

    def evaluate(self, engine: Engine, *, preempted: Callable[[], bool]) -> dict[str, float] | None:
        """Return the figures by name; all ranks call it together.

        Args:
            engine: holds the model.
            preempted: whether this rank has been asked to leave: it then leaves the rest unanswered.

        Returns:
            ``None`` where some rank has been asked to leave.

        Raises:
            ConfigError: a task cannot be answered, or none measures ``checkpoint.best_metric``.
            EnvironmentProblem: the data of a task cannot be fetched.
        """
        if not self._request.tasks:
            return {}
        from launcher.engines.distributed import from_main_rank, sum_over_ranks
        from launcher.training.lm_eval_harness import RankModel, answer_tasks, task_numbers

        with engine.whole_model() as whole, _kept_generators():
            model = RankModel(
                whole.module,
                self._tokenizer,
                batch_size=self._batch_size,
                context=self._context,
                device=engine.device,
                autocast=whole.autocast,
                phase="evaluate",
                abandoned=preempted,
            )
            found = answer_tasks(self._request, self._manager, model)
        if any(sum_over_ranks([float(preempted())], device=engine.device)):
            return None
        scores = {} if found is None else {**found["results"], **found.get("groups", {})}
        own = {
            f"{TASK_METRICS}{task}/{name}": value
            for task, values in scores.items()
            for name, value in task_numbers(values)
        }
        metrics: dict[str, float] = from_main_rank(own, device=engine.device)
        if self._best.startswith(TASK_METRICS) and self._best not in metrics:
            why = f"is not measured: the tasks measure {', '.join(metrics)}"
            best = self._context.run.checkpoint.best_metric
            raise ConfigError("checkpoint.best_metric", best, why=why, fix="name one of them")
        return metrics


def _as_in_a_checkpoint(context: Context, tokenizer: FastTokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as Transformers loads it from a checkpoint of this run."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(context, tokenizer, Path(folder), heartbeat=lambda: context.heartbeat.update("load"))
        return load_transformers_tokenizer(
            Path(folder), option="data.tokenizer", config_option="data.tokenizer", fix="set data.tokenizer=bpe"
        )


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    """In this context the random generators may be seeded: afterwards they go on as before."""
    import numpy as np
    import torch

    own, arrays = random.getstate(), np.random.get_state()  # what the harness seeds
    with torch.random.fork_rng():
        yield
    random.setstate(own)
    np.random.set_state(arrays)
