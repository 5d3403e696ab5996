"""lm-evaluation-harness on a model that every rank holds: documents are divided over ranks.

Tokenisation, scoring, generation and figures are those of the harness's own class for models of Transformers, so that
they are what it prints for the model. Everything here needs the extra ``eval``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from launcher.config.lm_eval_tasks import is_task_file
from launcher.engines.base import never_preempted
from launcher.engines.distributed import barrier
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.utils.text import counted, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from launcher.config.lm_eval_tasks import TaskRequest
    from launcher.engines.context import Context


class RankModel(HFLM):  # type: ignore[misc]  # lm_eval is not followed
    """The model of one rank, as lm_eval takes it; every rank answers its share of the documents.

    Args:
        model: whole, on its device.
        tokenizer: of the model.
        batch_size: requests in one forward pass.
        context: of this rank.
        device: of the model where it computes.
        autocast: format of its matrix products; ``None`` for that of its weights.
        phase: of this rank meanwhile.
        abandoned: whether this rank must leave: it answers the rest with what costs nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        batch_size: int,
        context: Context,
        device: torch.device,
        autocast: torch.dtype | None = None,
        phase: str = "measure",
        abandoned: Callable[[], bool] = never_preempted,
    ) -> None:
        with _tied_already(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._rank, self._world_size, self._device = context.rank, context.world_size, device
        self._heartbeat, self._phase, self._abandoned = context.heartbeat, phase, abandoned
        self.mixed_precision_dtype = autocast

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._heartbeat.update(self._phase)
        if self._abandoned():
            return torch.zeros(*inps.shape, self.model.config.vocab_size, device=inps.device)
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._heartbeat.update(self._phase)
        if self._abandoned():
            return context
        return super()._model_generate(context, *args, synced_gpus=False, **kwargs)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's count for every rank, so that lm_eval repeats no requests.

        It pads because a forward pass may need all ranks; here each rank has the whole model.
        """
        return tensor.reshape(-1).repeat(self._world_size)

    def barrier(self) -> None:
        """Wait for all ranks."""
        barrier()


class RankTaskManager(TaskManager):  # type: ignore[misc]  # lm_eval is not followed
    """Loads tasks, each of which must have a document for every rank."""

    num_ranks: int = 1
    request: TaskRequest

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loaded tasks.

        Raises:
            ConfigError: a task runs code that was not allowed, or has fewer documents than there are ranks; lm_eval
                needs one on each.
        """
        loaded = super().load(*args, **kwargs)
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self.request.run_unsafe_code:
                raise self.request.unsafe(name)
        for name, task in loaded["tasks"].items() if self.num_ranks > 1 else ():
            if (count := len(task.eval_docs)) < self.num_ranks:
                why = f"has {counted(count, 'document')} for {self.num_ranks} ranks, and each needs one"
                raise ConfigError(self.request.option, name, why=why, fix=f"set backend.ranks={max(count, 1)}")
        return loaded


def make_task_manager(request: TaskRequest, *, num_ranks: int = 1) -> RankTaskManager:
    """Return the index of the tasks that a request can name.

    Args:
        request: of the tasks.
        num_ranks: that divide the documents of each.

    Raises:
        ConfigError: it names an unknown one.
    """
    only_files = all(map(is_task_file, request.tasks))
    folders = list(request.include_path) or None
    manager = RankTaskManager(include_path=folders, include_defaults=not only_files)  # seconds for thousands of files
    manager.num_ranks, manager.request = num_ranks, request
    for name in request.tasks:
        if not is_task_file(name) and name not in manager.task_index:
            fix = did_you_mean(name, manager.all_tasks)
            raise ConfigError(request.option, name, why="is no task of the installed lm_eval", fix=fix)
    return manager


def answer_tasks(request: TaskRequest, manager: RankTaskManager, model: RankModel) -> dict[str, Any] | None:
    """Return what lm_eval found, on rank 0; all ranks call it together.

    Raises:
        ConfigError: a task runs code that was not allowed, or cannot be answered.
        EnvironmentProblem: the data of a task cannot be fetched.
    """
    found: dict[str, Any] | None
    with _named_errors(request):
        found = simple_evaluate(
            model,
            tasks=list(request.tasks),
            num_fewshot=request.num_fewshot,
            limit=request.limit,
            apply_chat_template=request.apply_chat_template,
            task_manager=manager,
            log_samples=request.log_samples,
            bootstrap_iters=request.bootstrap_iters,
            confirm_run_unsafe_code=request.run_unsafe_code,
        )
    return found


def check_tasks(request: TaskRequest, manager: RankTaskManager) -> None:
    """Load the tasks, and fetch their data, before the run trains.

    Raises:
        ConfigError: a task runs code that was not allowed, or cannot be loaded.
        EnvironmentProblem: the data of a task cannot be fetched.
    """
    with _named_errors(request):
        manager.load(list(request.tasks))


@contextmanager
def _named_errors(request: TaskRequest) -> Iterator[None]:
    """Raise what lm_eval raises as errors of the option that names the tasks."""
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        why = f"the data of a task cannot be fetched: {error}"
        raise EnvironmentProblem(f"{request.option}={','.join(request.tasks)}: {why}") from error
    except (ValueError, KeyError, FileNotFoundError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(request.option, ",".join(request.tasks), why=why, fix="correct the task") from error


def task_numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of a task: ``acc`` of ``acc,none``, and ``acc,strict`` as it is."""
    for name, value in values.items():
        metric, _, of_filter = name.partition(",")
        if of_filter and isinstance(value, int | float):
            yield (metric if of_filter == "none" else f"{metric}.{of_filter}"), float(value)


@contextmanager
def _tied_already(model: PreTrainedModel) -> Iterator[None]:
    """In this context ``model`` ties no weights.

    It was built with them tied, and ranks may hold shards of them.
    """
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
