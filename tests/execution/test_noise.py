"""What is printed once, not at all, or within the terminal's width; what the end of a run names."""

from __future__ import annotations

import json
import logging
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import _distutils_hack
import pytest

from launcher.__main__ import main
from launcher.config.compose import compose
from launcher.config.folders import groups
from launcher.errors import ConfigErrors
from launcher.execution.summary import closing_text, opening_lines
from launcher.planning.render import render_plan
from launcher.protocol.outcome import Failure, RunOutcome
from launcher.protocol.rundir import RunDir
from launcher.runs.state import read_run_state
from launcher.supervision.finalize import closing_message
from launcher.supervision.host_ranks import ExceptionTextFilter
from launcher.utils.files import write_json
from launcher.utils.logs import quiet_libraries
from launcher.utils.text import format_table
from tests.conftest import BOX, PlanOf


def test_no_table_of_list_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (None, "140"):  # 100 where nothing says how wide it is
        monkeypatch.delenv("COLUMNS", raising=False) if columns is None else monkeypatch.setenv("COLUMNS", columns)
        assert main(["list"]) == 0
        assert main(["list", *groups(), "run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        width = int(columns or 100)
        assert [line for line in lines if len(line) > width and len(line.split()) > 1 and "http" not in line] == []


def test_one_long_cell_makes_no_table_wide() -> None:
    rows = [
        ("key", "z" * 300, "a list of text", "What it means, in a sentence of several words."),
        ("b", "1", "c", "d"),
    ]
    lines = list(format_table(rows, indent="  ", width=80))
    assert max(map(len, lines)) <= 80
    assert "".join("".join(lines).split()).count("z") == 300, "nothing is cut off"
    assert list(format_table([("a", "b c")])) == ["a  b c"]


def test_libraries_are_quiet_about_themselves(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    before = [list(logger.filters) for logger in loggers]
    quiet_libraries()
    try:
        loggers[0].warning("Failed to load /x.so: Could not load this library")
        loggers[1].warning("%s is an Enum subclass and is now natively supported by torch.compile", "E")
        loggers[0].warning("something else")
        loggers[1].warning("something else")
        assert [record.getMessage() for record in caplog.records] == ["something else", "something else"]
    finally:
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters[:] = filters


def test_a_rank_with_deepspeed_is_quiet_about_setuptools(monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.engines.deepspeed.base import silence_deepspeed_log

    monkeypatch.setattr(sys, "modules", {**sys.modules, "distutils": types.ModuleType("distutils")})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_deepspeed_log()
        _distutils_hack.warn_distutils_present()
        _distutils_hack.clear_distutils()
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_what_a_rank_says_when_it_fails_is_left_out_of_what_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "failure.rank0.txt"
    file.write_text("of an earlier attempt")
    words = ExceptionTextFilter(file)
    assert words.filter(["of an earlier attempt", "step 1"]) == ["of an earlier attempt", "step 1"]
    file.write_text("Traceback:\n  line 1\nValueError: x")
    shown = ["step 2", "Traceback:", "  line 1"]
    assert words.filter(shown) == ["step 2"]
    assert words.filter(["step 3", "ValueError: x", "ValueError: x"]) == ["step 3", "ValueError: x"]


def test_a_quantization_is_not_announced_in_steps_of_a_batch(plan_of: PlanOf) -> None:
    plan = plan_of("job=quantize", "quantization=int8_weight", "parallel=single", hosts=[replace(BOX, slots=1)])
    first = next(opening_lines(plan))
    assert first.endswith("quantize, compared on 64 held-out sequences of 128 tokens")
    text = render_plan(plan)
    assert "a step" not in text
    assert "compared on  64 held-out sequences of 128 tokens" in text


@pytest.mark.parametrize(
    ("sequences", "said"),
    [("64", "1,024 a step × 8 steps = 8,192"), ("60", "1,024 a step, 7,680 in 8 steps, the last one partial")],
)
def test_an_evaluation_counts_the_tokens_of_its_sequences(plan_of: PlanOf, sequences: str, said: str) -> None:
    words = ("job=evaluate", "parallel=single", f"job.eval_sequences={sequences}")
    assert said in render_plan(plan_of(*words, hosts=[replace(BOX, slots=1)]))


def test_the_end_names_what_is_left_and_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(tmp_path / "runs" / "a b" / "x")
    (run_dir.checkpoints / "step_00000010").mkdir(parents=True)
    for name in ("run.yaml", "plan.json", "loss.png", "metrics.jsonl", ".lock"):
        (run_dir.path / name).touch()
    result = {"status": "completed", "metrics": {"eval/loss": 1.0}}
    said = closing_text(result, run_dir, elapsed_s=3.0).splitlines()
    assert said[:2] == ["completed in 3 s; held-out loss 1.0000", "left in runs/a b/x: loss.png, metrics.jsonl"]
    assert [line.removeprefix("next:").strip() for line in said[2:]] == [
        "launch report 'runs/a b/x'",
        "launch status 'runs/a b/x'",
    ]
    assert "launch rerun 'runs/a b/x'" in closing_message(RunOutcome(status="cancelled", exit_code=130), run_dir)
    (run_dir.checkpoints / "step_00000010" / "manifest.json").touch()
    assert "checkpoints/step_00000010" in closing_text(result, run_dir, elapsed_s=3.0)
    assert "launch resume 'runs/a b/x'" in closing_text(result, run_dir, elapsed_s=3.0)
    write_json(run_dir.plan, {"job": "train", "work": {"num_steps": 10}})
    assert "metrics.jsonl" in closing_text(result, run_dir, elapsed_s=3.0).splitlines()[1]
    write_json(run_dir.plan, {"job": "train", "work": {"num_steps": 10}, "details": {"output": "/else/where"}})
    assert closing_text(result, run_dir, elapsed_s=3.0).splitlines()[1].endswith("; outside it: /else/where")
    write_json(run_dir.result, {**result, "exit_code": 0})
    assert "launch resume 'runs/a b/x' job.steps=20" in closing_text(result, run_dir, elapsed_s=3.0)
    for status, code in (("cancelled", 130), ("preempted", 75)):
        assert "launch resume 'runs/a b/x'" in closing_message(RunOutcome(status=status, exit_code=code), run_dir)


def test_the_end_of_a_run_that_did_not_complete_names_what_status_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(tmp_path / "runs" / "x")
    weights = run_dir.checkpoints / "step_00000010" / "model"
    weights.mkdir(parents=True)
    write_json(run_dir.plan, {"job": "train", "work": {"num_steps": 20}})
    failure = Failure(host="box", rank=0, exit_code=1, signal=None, reason="it broke", log="x.log")
    ends = (
        RunOutcome(status="failed", exit_code=1, failure=failure),
        RunOutcome(status="cancelled", exit_code=143),
        RunOutcome(status="preempted", exit_code=75),
    )
    failed, cancelled, preempted = (closing_message(end, run_dir) for end in ends)
    assert "resume" not in failed + cancelled
    assert "launch resume runs/x" in preempted
    (weights.parent / "state").mkdir()
    for name in ("../manifest.json", "../state/rank_00000.safetensors", "tokenizer.json"):
        (weights / name).touch()
    for end in ends:
        assert "launch resume runs/x" in closing_message(end, run_dir)
    last = [line.removeprefix("next:").strip() for line in closing_message(ends[0], run_dir).splitlines()]
    at = last.index("launch logs runs/x --rank 0")
    assert last[at + 1 : at + 4] == ["launch report runs/x", "launch resume runs/x", "launch rerun runs/x"]
    write_json(run_dir.plan, {"job": "train", "work": {"num_steps": 10}})  # its last step is saved
    for end in ends:
        assert "launch job=generate model.weights=runs/x" in closing_message(end, run_dir)
        assert "launch resume" not in closing_message(end, run_dir)


def test_a_run_that_kept_answers_names_resume_before_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(tmp_path / "runs" / "x")
    run_dir.generated.mkdir(parents=True)
    write_json(run_dir.plan, {"job": "generate", "work": {"num_steps": 20}})
    failure = Failure(host="box", rank=0, exit_code=1, signal=None, reason="it broke", log="x.log")
    ends = (RunOutcome(status="failed", exit_code=1, failure=failure), RunOutcome(status="cancelled", exit_code=130))
    part = run_dir.generated / "rank0.part"
    part.touch()
    for end in ends:
        assert "resume" not in closing_message(end, run_dir)
    part.write_text("0 3 a 0 {}\n")
    for end in ends:
        said = closing_message(end, run_dir)
        assert "launch resume runs/x" in said
        assert "launch rerun" not in said.partition("launch resume")[0]


@pytest.mark.parametrize(
    ("job", "planned", "step", "shown"),
    [("train", 10, 6, "6/10"), ("evaluate", 2, 6, "of step 6"), ("evaluate", 2, 0, "-"), ("serve", 0, None, "-")],
)
def test_steps_are_set_against_what_counts_them(
    tmp_path: Path, job: str, planned: int, step: int | None, shown: str
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"job": job, "work": {"num_steps": planned}}))
    if step is not None:
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"train/step": step}) + "\n")
    assert read_run_state(RunDir(tmp_path)).steps_text == shown


def test_a_stated_peak_is_a_positive_number() -> None:
    assert compose(["job.peak_tflops=1.5"]).run.job.peak_tflops == 1.5  # type: ignore[attr-defined]
    with pytest.raises(ConfigErrors, match=r"job\.peak_tflops=0 .*above 0"):
        compose(["job.peak_tflops=0"])
