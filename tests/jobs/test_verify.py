"""The job ``verify``: real runs that agree, that are made to differ, and that fail in the middle."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.job.verify import STRATEGIES, Placement
from launcher.errors import ConfigErrors, JobError
from launcher.protocol.plan import Host
from launcher.utils.files import read_json, write_json
from launcher.verification.comparison import StrategyResult, compare
from launcher.verification.forked_ranks import ERROR_KEY, TIME_KEY, FileRendezvous, run_in_fork
from launcher.verification.resuming import ResumeResult

BOX = Host(name="box", slots=2, cores=4, memory_bytes=16 * 2**30)
VERIFY = (
    *("job=verify", "tracker=local", "data=synthetic", "schedule=constant", "backend.ranks=2", "backend.threads=1"),
    *(
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "model.num_attention_heads=2",
        "model.max_position_embeddings=32",
        "model.vocab_size=64",
    ),
    *("data.vocab_size=64", "job.sequence_length=16", "job.micro_batch=2", "job.global_batch=8", "run.dir=run"),
)


def compared(folder: Path) -> dict[str, Any]:
    strategies: dict[str, Any] = read_json(folder / "run" / "verify.json")["strategies"]
    return strategies


def test_strategies_take_the_steps_of_one_process(launch, tmp_path) -> None:
    names = ["ddp_micro1", "fsdp", "sequence", "zero3"]
    ended = launch(*VERIFY, "job.steps=4", f"job.strategies=[{','.join(names)}]", timeout=550).expect(0)
    rows = compared(tmp_path)
    assert list(rows) == names
    for row in rows.values():
        assert row["passed"]
        assert row["tokens_equal"]
        assert (row["error"], row["loss_diff"] <= 1e-5, row["grad_norm_diff"] <= 1e-4) == ("", True, True)
        assert row["weights_diff"] < 1e-4
    assert max(row["weights_diff"] for row in rows.values()) > 0  # they really are different sums
    metrics = read_json(tmp_path / "run" / "result.json")["metrics"]
    assert metrics["verify/zero3/loss_diff"] == rows["zero3"]["loss_diff"]
    assert "| zero3 |" in (tmp_path / "run" / "verify.md").read_text()
    assert "all 4 strategies take the steps of one process" in ended.stdout
    assert not (tmp_path / "run" / "verify").exists(), "files that ranks exchanged are left behind"


def test_another_learning_rate_is_seen(launch, tmp_path) -> None:
    ended = launch(*VERIFY, "job.strategies=[ddp]", "job.perturb=0.01", timeout=550).expect(1)
    (row,) = compared(tmp_path).values()
    assert row["loss_diff"] > 1e-5
    assert row["weights_diff"] > 1e-4
    assert not row["passed"]
    assert "the worst is ddp: loss differs by" in ended.output


def test_a_strategy_that_fails_is_a_row(launch, tmp_path) -> None:
    """DeepSpeed itself refuses a value that no option of ours holds; the next strategy is taken all the same."""
    bad = "parallel.deepspeed={zero_optimization: {stage3_max_reuse_distance: -5}}"
    ended = launch(*VERIFY, "parallel=zero3", bad, "job.strategies=[run,ddp]", "job.steps=2").expect(1)
    rows = compared(tmp_path)
    assert "stage3_max_reuse_distance" in rows["run"]["error"]
    assert not rows["run"]["passed"]
    assert rows["ddp"]["passed"]
    assert "1 of 2 strategies are not equal to one process; the worst is run" in ended.output
    assert "Traceback" in "".join(log.read_text() for log in (tmp_path / "run" / "logs").glob("*.[01].log"))


def forked(work: Any, folder: Path, *, limit_s: float = 30.0, give_up: Any = lambda: "") -> tuple[Any, int]:
    """Return what a forked child answers and how often its parent sent a heartbeat."""
    beats: list[None] = []
    answer = folder / "case.0.json"
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a rank answers it with its stacks
    try:
        run_in_fork(work, answer, limit_s=limit_s, heartbeat=lambda: beats.append(None), give_up=give_up)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    return json.loads(answer.read_text()), len(beats)


def test_a_fork_answers(tmp_path) -> None:
    assert forked(lambda: {"pid": os.getpid()}, tmp_path)[0]["pid"] != os.getpid()


def test_a_fork_that_is_killed_hangs_or_leaves_is_in_trouble(tmp_path) -> None:
    for number, (work, words) in enumerate(
        [
            (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
            (lambda: time.sleep(60), "was not done after 0.5 s"),
            (lambda: os._exit(7), "exit code 7"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        answer, beats = forked(work, folder, limit_s=0.5)
        assert words in answer[ERROR_KEY]
        assert beats


def test_the_ranks_of_a_case_follow_one_that_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("launcher.verification.forked_ranks._FAILURE_GRACE_S", 0.2)
    rendezvous = FileRendezvous(tmp_path, 0, lambda: None)
    write_json(rendezvous.answer_of("case", 1), {ERROR_KEY: "out of memory", TIME_KEY: time.time()})
    answer, _ = forked(lambda: time.sleep(60), tmp_path, give_up=rendezvous.failure_watcher("case", world_size=2))
    assert answer[ERROR_KEY] == "ended because rank 1 had failed"
    row = compare("case", rendezvous.collect("case", world_size=2, limit_s=5), {}, seconds=1.0)
    assert row.error == "rank 1: out of memory"


def test_rank_0_waits_for_the_others_before_it_clears_up(tmp_path) -> None:
    folder = tmp_path / "verify" / "29500"
    folder.mkdir(parents=True)
    first, second = (FileRendezvous(folder, rank, lambda: None) for rank in range(2))
    first.finish(world_size=2, limit_s=0.3)
    assert folder.exists(), "rank 1 is still there, and would write into it"
    second.finish(world_size=2, limit_s=0.3)
    first.finish(world_size=2, limit_s=0.3)
    assert not (tmp_path / "verify").exists()


def test_ranks_that_see_no_port_say_so(tmp_path) -> None:
    with pytest.raises(JobError, match=r"run\.root"):
        FileRendezvous(tmp_path, 1, lambda: None).agree_on_port("case", limit_s=0.2)


def answers(**changes: Any) -> dict[int, Any]:
    weights = {"apart": {"a": [1e-12, 1.0]}, "unknown": [], "all": ["a"]}
    usual = {"losses": [2.0, 1.0], "grad_norms": [0.5, 0.5], "generated": [[1, 2]], "weights": weights}
    return {0: {**usual, **changes}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"losses": [2.0, 1.0002]}, "loss differs by 2.0e-04"),
        ({"losses": [2.0, math.nan]}, "loss differs by inf"),
        ({"grad_norms": [0.5, None]}, "gradient norm differs by inf"),
        ({"generated": [[1, 3]]}, "other tokens"),
        ({"weights": {"apart": {}, "unknown": [], "all": ["a"]}}, "missing on all ranks: a"),
        ({"weights": {"apart": {"a": [0, 1]}, "unknown": ["b"], "all": ["a"]}}, "not in the reference: b"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], words: str) -> None:
    job = compose(["job=verify"]).run.job
    row = compare("case", answers(**changes), answers()[0], seconds=1.0)
    assert (row.excess(job) > 1) == bool(words)
    assert words in row.why(job)
    assert bool(row.why(job)) == bool(words)


def test_the_plan_lists_what_is_compared_and_what_is_not(plan_of) -> None:
    plan = plan_of(*VERIFY)
    assert plan.work.num_steps == 10 * len(plan.details)
    assert next(iter(plan.details)) == "reference"
    assert plan.details["zero3_micro1"].endswith("micro 1 × accum 4 × dp 2 = 8")
    assert plan.details["reference"].endswith("micro 2 × accum 4 × dp 1 = 8")
    assert not {"tensor", "hsdp", "pipeline4_gpipe"} & plan.details.keys()
    assert any("hsdp" in warning and "needs 4 ranks" in warning for warning in plan.warnings)
    assert "verify.md" in plan.files


def test_a_llama_has_a_tensor_plan(plan_of) -> None:
    host = replace(BOX, slots=4)
    assert "tensor" in plan_of("+exp=verify_llama", hosts=[host]).details
    everything = plan_of("+exp=verify_all", hosts=[host]).details
    assert set(STRATEGIES) - everything.keys() == {"tensor", "tensor_recomputed"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("job.strategies=[zreo3]",), "did you mean zero3"),
        (("job.strategies=[hsdp]",), "needs 4 ranks"),
        (("job.strategies=[]",), "job.strategies=auto"),
        (("precision=bf16",), "precision=fp32"),
        (("model.dropout=0.1",), "model.dropout=0"),
        (("checkpoint.resume=elsewhere",), "checkpoint.resume=none"),
        (("job.global_batch=7",), "does not divide 7"),
    ],
)
def test_what_cannot_be_compared_is_refused(plan_of, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigErrors) as refused:
        plan_of(*VERIFY, *words)
    assert said in str(refused.value)


def test_the_worst_is_the_farthest_beyond_what_is_allowed() -> None:
    job = compose(["job=verify"]).run.job
    near = StrategyResult(name="near", seconds=1, loss_diff=2e-5, grad_norm_diff=0, weights_diff=0, tokens_equal=True)
    far = StrategyResult(name="far", seconds=1, loss_diff=0, grad_norm_diff=1e-3, weights_diff=0, tokens_equal=True)
    assert 1 < near.excess(job) < far.excess(job)


def test_checkpoints_go_on_under_other_strategies_and_ranks(launch, tmp_path) -> None:
    names = ["single", "fsdp", "sequence", "zero1", "zero3", "pipeline2_1f1b"]
    words = ("job.check=resume", "job.steps=3", f"job.strategies=[{','.join(names[1:])}]")
    ended = launch(*VERIFY, *words, timeout=550).expect(0)
    pairs = read_json(tmp_path / "run" / "verify.json")["pairs"]
    assert {(pair["source"].partition("@")[0], pair["target"].partition("@")[0]) for pair in pairs} == {
        (one, other) for one in names for other in names
    }
    placements = {*(f"{name}@2" for name in names[1:]), "single@1", "fsdp@1", "zero1@1", "zero3@1"}
    assert {pair["source"] for pair in pairs} == {pair["target"] for pair in pairs} == placements
    assert all(pair["passed"] and pair["exports_equal"] for pair in pairs)
    assert max(pair["loss_diff"] for pair in pairs) > 0, "they are different sums"
    assert f"all {len(pairs)} checkpoints go on as they did" in ended.stdout
    assert not (tmp_path / "run" / "verify").exists(), "checkpoints are left behind"


def test_a_checkpoint_that_exports_another_model_fails_also_when_the_losses_are_equal() -> None:
    job = compose(["job=verify"]).run.job
    place = Placement("fsdp", 2)
    equal = ResumeResult(source=place, target=place, loss_diff=0.0, undisturbed_diff=0.0, exports_equal=True)
    assert equal.why(job) == ""
    assert "other logits" in replace(equal, exports_equal=False).why(job)
    assert "loss differs" in replace(equal, loss_diff=1e-3).why(job)
