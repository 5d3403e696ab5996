"""Options of the benchmark lm_eval, checked without the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.benchmark.lm_eval import LmEvalBenchmark
from launcher.config.compose import compose
from launcher.errors import ConfigErrors
from launcher.execution.prepare import prepare


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file"),
        ("task: [a", "is not YAML: line 1"),
        ("- a\n", "is no task of lm_eval"),
        ("name: a\n", "is no task of lm_eval"),
        ("task: a\ndataset_kwargs: {data_files: {test: gone.json}}\n", "names the data file gone.json"),
        ("task: a\nprocess_docs: !function utils.f\n", ""),
    ],
)
def test_task_files_are_checked_before_anything_starts(tmp_path: Path, text: str | None, said: str) -> None:
    file = tmp_path / "task.yaml"
    if text is not None:
        file.write_text(text)
    errors = [str(error) for error in LmEvalBenchmark(tasks=(str(file),)).validate_machine()]
    assert len(errors) == bool(said)
    assert all(said in error for error in errors)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (error,) = LmEvalBenchmark(tasks=("arc_easy",)).validate_machine()
    assert "pip install 'launcher[eval]'" in str(error)


@pytest.mark.parametrize(
    "fields", [{}, {"tasks": ("a", "a")}, {"tasks": ("a",), "repeats": 2}, {"tasks": ("a",), "limit": 0}]
)
def test_options_that_ask_for_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigErrors):
        LmEvalBenchmark(**fields)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parallel=pipeline", "backend.ranks=2"), "no rank can hold the whole model"),
        (("parallel=fsdp", "parallel.tensor=2", "backend.ranks=2"), "no rank can hold the whole model"),
        (("data=synthetic",), "data=synthetic has no tokenizer"),
        (("job.eval_tasks=[a.yaml,a.yaml]",), "has duplicates"),
        (("job.eval_tasks=[gone.yaml]",), "there is no such file"),
        (("job.eval_tasks=[]", "job.eval_task_limit=3"), "job.eval_tasks names no task"),
        (("job.eval_task_limit=0",), "at least 1"),
        (("checkpoint.best_metric=max:acc",), "acc is not measured"),
    ],
)
def test_tasks_that_a_run_cannot_answer_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        prepare(compose(["model=llama_tiny", "backend.ranks=1", "job.eval_tasks=[arc_easy]", *words]))
    assert any(said in str(error) for error in caught.value.errors), caught.value.errors
