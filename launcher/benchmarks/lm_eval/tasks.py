"""The lm_eval benchmark: tasks of lm-evaluation-harness, documents divided over ranks.

The model is built as this program builds it (any weights, quantized ones too); tokenisation, scoring, generation and
figures are those of the harness's own class for models of Transformers, so that they are what it prints for the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.config.benchmark.lm_eval import is_task_file
from launcher.engines.distributed import barrier, choose_device, connect, disconnect
from launcher.errors import ConfigError, EnvironmentProblem
from launcher.inference.engine.model_loader import load_model
from launcher.models.pretrained import tokenizer_folder, tokenizer_folder_option
from launcher.models.tokenizer import load_transformers_tokenizer
from launcher.utils.files import write_atomic
from launcher.utils.text import counted, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from launcher.config.benchmark.lm_eval import LmEvalBenchmark
    from launcher.engines.context import Context


class RankModel(HFLM):  # type: ignore[misc]  # lm_eval is not followed
    """The model of one rank, as lm_eval takes it; every rank answers its share of the documents.

    Args:
        model: whole, on its device.
        tokenizer: of the model.
        batch_size: requests in one forward pass.
        context: of this rank.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, context: Context
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self._rank, self._world_size = context.rank, context.world_size
        self._heartbeat = context.heartbeat

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._heartbeat.update("measure")
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._heartbeat.update("measure")
        return super()._model_generate(*args, **kwargs)

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

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loaded tasks.

        Raises:
            ConfigError: a task has fewer documents than there are ranks; lm_eval needs one on each.
        """
        loaded = super().load(*args, **kwargs)
        for name, task in loaded["tasks"].items() if self.num_ranks > 1 else ():
            if (count := len(task.eval_docs)) < self.num_ranks:
                why = f"has {counted(count, 'document')} for {self.num_ranks} ranks, and each needs one"
                raise ConfigError("benchmark.tasks", name, why=why, fix=f"set backend.ranks={max(count, 1)}")
        return loaded


def run_lm_eval_benchmark(benchmark: LmEvalBenchmark, context: Context) -> BenchmarkResults | None:
    """Answer the tasks; rank 0 returns the results.

    Raises:
        ConfigError: a task is unknown, runs code that was not allowed, or cannot be answered.
        EnvironmentProblem: the data of a task cannot be fetched.
    """

    def loading() -> None:
        context.heartbeat.update("load")

    device = choose_device(context.local_rank)
    connect(context, device)
    try:
        manager = make_task_manager(benchmark, num_ranks=context.world_size)
        folder = tokenizer_folder(context.run.model, heartbeat=loading) if benchmark.tokenizer == "model" else None
        option = tokenizer_folder_option(context.run.model) if folder else "benchmark.tokenizer"
        tokenizer = load_transformers_tokenizer(
            folder or Path(benchmark.tokenizer).expanduser(),
            option=option,
            config_option=option,
            fix="set benchmark.tokenizer to a folder that has one",
        )
        model = load_model(context.run, device=device, engine="transformers", heartbeat=loading)
        wrapped = RankModel(model, tokenizer, batch_size=benchmark.batch_size, context=context)
        found = _evaluate(benchmark, manager, wrapped)
    finally:
        disconnect()
    return None if found is None else _results(benchmark, found, context)


def make_task_manager(benchmark: LmEvalBenchmark, *, num_ranks: int = 1) -> RankTaskManager:
    """Return the index of the tasks that a benchmark can name.

    Args:
        benchmark: whose tasks they are.
        num_ranks: that divide the documents of each.

    Raises:
        ConfigError: it names an unknown one.
    """
    only_files = all(map(is_task_file, benchmark.tasks))
    folders = list(benchmark.include_path) or None
    manager = RankTaskManager(include_path=folders, include_defaults=not only_files)  # seconds for thousands of files
    manager.num_ranks = num_ranks
    for name in benchmark.tasks:
        if not is_task_file(name) and name not in manager.task_index:
            fix = did_you_mean(name, manager.all_tasks)
            raise ConfigError("benchmark.tasks", name, why="is no task of the installed lm_eval", fix=fix)
    return manager


def _evaluate(benchmark: LmEvalBenchmark, manager: RankTaskManager, model: RankModel) -> dict[str, Any] | None:
    """Return what lm_eval found, on rank 0."""
    found: dict[str, Any] | None
    try:
        found = simple_evaluate(
            model,
            tasks=list(benchmark.tasks),
            num_fewshot=benchmark.num_fewshot,
            limit=benchmark.limit,
            apply_chat_template=benchmark.apply_chat_template,
            task_manager=manager,
            log_samples=benchmark.log_samples,
            bootstrap_iters=benchmark.bootstrap_iters,
            confirm_run_unsafe_code=benchmark.run_unsafe_code,
        )
    except (ConnectionError, TimeoutError) as error:
        why = f"the data of a task cannot be fetched: {error}"
        raise EnvironmentProblem(f"benchmark.tasks={','.join(benchmark.tasks)}: {why}") from error
    except (ValueError, KeyError, FileNotFoundError) as error:
        why, fix = " ".join(str(error).split()), "correct the task"
        if "unsafe" in why:
            why, fix = "it runs code that the model writes", "set benchmark.run_unsafe_code=true if this machine may"
        raise ConfigError("benchmark.tasks", ",".join(benchmark.tasks), why=why, fix=fix) from error
    return found


def _results(benchmark: LmEvalBenchmark, found: Mapping[str, Any], context: Context) -> BenchmarkResults:
    scores = {**found["results"], **found.get("groups", {})}
    metrics = {f"{task}/{name}": value for task, values in scores.items() for name, value in _numbers(values)}
    if benchmark.log_samples:
        for task, samples in found["samples"].items():
            lines = (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) for each in samples)
            write_atomic(context.run_dir.path / f"samples_{task.replace(os.sep, '_')}.jsonl", "\n".join(lines) + "\n")
    cases = [
        BenchmarkCase(
            name=task,
            samples={name: (value,) for name, value in _numbers(values) if not name.endswith("_stderr")},
        )
        for task, values in scores.items()
    ]
    counts = found.get("n-samples", {})
    return BenchmarkResults(
        benchmark=benchmark,
        cases=[case for case in cases if case.samples],
        facts={
            task: {
                "version": found.get("versions", {}).get(task),
                "num_fewshot": found.get("n-shot", {}).get(task),
                "documents": counts.get(task, {}).get("effective"),
            }
            for task in scores
        },
        findings=(f"lm_eval {version('lm_eval')}, {len(scores)} tasks and groups",),
        metrics=metrics,
        tables=tuple(_table(scores, found)),
    )


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the figures of a task: ``acc`` of ``acc,none``, and ``acc,strict`` as it is."""
    for name, value in values.items():
        metric, _, of_filter = name.partition(",")
        if of_filter and isinstance(value, int | float):
            yield (metric if of_filter == "none" else f"{metric}.{of_filter}"), float(value)


def _table(scores: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> Iterator[str]:
    yield "| task | examples | metric | value | standard error |"
    yield "|---|---:|---|---:|---:|"
    shots = found.get("n-shot", {})
    for task, values in scores.items():
        numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        for name, value in numbers.items():
            metric, _, of_filter = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{of_filter}")
            shown = "" if error is None else f"{error:.4f}"
            label = metric if of_filter == "none" else f"{metric} ({of_filter})"
            yield f"| {task} | {shots.get(task, '')} | {label} | {value:.4f} | {shown} |"
