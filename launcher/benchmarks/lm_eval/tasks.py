"""The lm_eval benchmark: tasks of lm-evaluation-harness, documents divided over ranks.

The model is built as this program builds it (any weights, quantized ones too).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.utils import handle_non_serializable

from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
from launcher.engines.distributed import choose_device, connect, disconnect
from launcher.inference.engine.model_loader import load_model
from launcher.models.pretrained import tokenizer_folder, tokenizer_folder_option
from launcher.models.tokenizer import load_transformers_tokenizer
from launcher.training.lm_eval_harness import RankModel, answer_tasks, make_task_manager, task_numbers
from launcher.utils.files import write_atomic

if TYPE_CHECKING:
    from launcher.config.benchmark.lm_eval import LmEvalBenchmark
    from launcher.engines.context import Context


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
        manager = make_task_manager(benchmark.request, num_ranks=context.world_size)
        folder = tokenizer_folder(context.run.model, heartbeat=loading) if benchmark.tokenizer == "model" else None
        option = tokenizer_folder_option(context.run.model) if folder else "benchmark.tokenizer"
        tokenizer = load_transformers_tokenizer(
            folder or Path(benchmark.tokenizer).expanduser(),
            option=option,
            config_option=option,
            fix="set benchmark.tokenizer to a folder that has one",
        )
        model = load_model(
            context.run, device=device, engine="transformers", heartbeat=loading, is_first=context.is_main
        )
        wrapped = RankModel(model, tokenizer, batch_size=benchmark.batch_size, context=context, device=device)
        found = answer_tasks(benchmark.request, manager, wrapped)
    finally:
        disconnect()
    return None if found is None else _results(benchmark, found, context)


def _results(benchmark: LmEvalBenchmark, found: Mapping[str, Any], context: Context) -> BenchmarkResults:
    scores = {**found["results"], **found.get("groups", {})}
    metrics = {f"{task}/{name}": value for task, values in scores.items() for name, value in task_numbers(values)}
    if benchmark.log_samples:
        for task, samples in found["samples"].items():
            lines = (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) for each in samples)
            write_atomic(context.run_dir.path / f"samples_{task.replace(os.sep, '_')}.jsonl", "\n".join(lines) + "\n")
    cases = [
        BenchmarkCase(
            name=task,
            samples={name: (value,) for name, value in task_numbers(values) if not name.endswith("_stderr")},
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
