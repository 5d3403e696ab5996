"""What ranks of the job ``verify`` make of answers: forks, which ``test_verify.py`` starts, are replaced here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.job.verify import SINGLE_PROCESS, STRATEGIES, Placement, ResumePairs, SelectedStrategies
from launcher.engines.context import Context
from launcher.errors import JobError
from launcher.protocol.heartbeat import Heartbeat
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json, write_json
from launcher.verification import resuming
from launcher.verification.comparison import error_of
from launcher.verification.forked_ranks import ERROR_KEY, TIME_KEY, FileRendezvous, ForkedRanks
from launcher.verification.resuming import ResumeVerification
from launcher.verification.verify import Verification

FAILED = {ERROR_KEY: "out of memory", TIME_KEY: 1.0}
SOLVED = {
    "losses": [2.0, 1.0],
    "grad_norms": [0.5, 0.5],
    "generated": [[1, 2]],
    "weights": {"apart": {"a": [1e-12, 1.0]}, "unknown": [], "all": ["a"]},
}


@pytest.fixture
def contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """Return the contexts of two ranks of a run that verifies on two."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    run = compose(["job=verify", "job.steps=2", "job.global_batch=8", "job.micro_batch=2"]).run
    return [
        Context(
            run=run,
            run_dir=RunDir(tmp_path),
            rank=rank,
            local_rank=rank,
            world_size=2,
            heartbeat=Heartbeat(None),
        )
        for rank in range(2)
    ]


def answer_instead(monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, dict[int, Any]]) -> list[str]:
    """Give rank 0 these answers, by case, in place of forks; return the names of the cases that ranks take."""
    taken: list[str] = []

    def run_case(self: ForkedRanks, name: str, work: Any, *, run: Any, world_size: int) -> dict[int, Any]:
        taken.append(name)
        return answers[name] if self.context.is_main else {}

    monkeypatch.setattr(ForkedRanks, "run_case", run_case)
    monkeypatch.setattr(ForkedRanks, "finish", lambda self: None)
    return taken


def test_the_report_has_every_strategy_what_is_left_out_and_what_is_off_on_purpose(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    choice = SelectedStrategies(
        sequences=8,
        cases={name: STRATEGIES[name] for name in ("ddp", "fsdp")},
        left_out={"hsdp": "needs 4 ranks"},
    )
    job = compose(["job=verify", "job.steps=2", "job.perturb=0.01"]).run.job
    answer_instead(
        monkeypatch, {"reference": {0: SOLVED}, "ddp": {0: SOLVED, 1: SOLVED}, "fsdp": {0: SOLVED, 1: FAILED}}
    )
    with pytest.raises(JobError, match=r"^1 of 2 strategies .* worst is fsdp: rank 1: out of memory"):
        Verification(job, contexts[0], choice).run()
    page = (tmp_path / "verify.md").read_text()
    for line in (
        "| ddp | 0.0e+00 | 0.0e+00 | 1.0e-06 | equal |",
        "| fsdp | - | - | - | - |",
        "\nLeft out:\n\n- hsdp: needs 4 ranks\n",
        "is off by +1.0%, on purpose",
    ):
        assert line in page
    found = read_json(tmp_path / "verify.json")
    assert (found["left_out"], found["strategies"]["fsdp"]["loss_diff"]) == ({"hsdp": "needs 4 ranks"}, None)


def test_a_rank_that_does_not_report_takes_the_same_cases_and_writes_nothing(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taken = answer_instead(monkeypatch, {})
    choice = SelectedStrategies(sequences=8, cases={"ddp": STRATEGIES["ddp"]})
    Verification(contexts[1].run.job, contexts[1], choice).run()
    one, two = Placement("single", 1), Placement("ddp", 2)
    cases = {"single": SINGLE_PROCESS, "ddp": STRATEGIES["ddp"]}
    ResumeVerification(
        contexts[1].run.job, contexts[1], ResumePairs(sequences=8, cases=cases, pairs=((one, two),))
    ).run()
    assert taken == ["reference", "ddp", "save_single@1", "resume_ddp@2"]
    assert [path.name for path in tmp_path.iterdir()] == ["verify"], "where ranks meet"


def test_a_reference_that_fails_ends_the_job(contexts: list[Context], monkeypatch: pytest.MonkeyPatch) -> None:
    answer_instead(monkeypatch, {"reference": {0: FAILED}})
    choice = SelectedStrategies(sequences=8, cases={"ddp": STRATEGIES["ddp"]})
    with pytest.raises(JobError, match=r"^one process, the reference, failed: out of memory$"):
        Verification(contexts[0].run.job, contexts[0], choice).run()


def test_a_checkpoint_that_is_not_saved_or_not_resumed_is_a_row_with_the_reason(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two, four = Placement("single", 1), Placement("ddp", 2), Placement("fsdp", 2)
    cases = {"single": SINGLE_PROCESS, "ddp": STRATEGIES["ddp"], "fsdp": STRATEGIES["fsdp"]}
    pairs = ((one, one), (one, two), (two, one), (one, four))
    chosen = ResumePairs(sequences=8, cases=cases, pairs=pairs, left_out={"hsdp": "needs 4 ranks"})
    resumed = {"resumed": {"single@1": [2.0, 1.5], "ddp@2": [2.0, 1.0]}}
    answers = {
        "save_single@1": {0: {"losses": [2.0, 1.0]}},
        "save_ddp@2": {0: {"losses": [2.0, 1.0]}, 1: FAILED},
        "resume_single@1": {0: resumed},
        "resume_ddp@2": {0: FAILED, 1: {**FAILED, TIME_KEY: 2.0}},
        "resume_fsdp@2": {0: {"resumed": {"single@1": [2.0, 1.0]}}, 1: {}},
    }
    answer_instead(monkeypatch, answers)
    exported: list[str] = []
    monkeypatch.setattr(resuming, "_exported_logits", lambda folder: exported.append(folder.name) or "the same")
    with pytest.raises(JobError, match=r"^3 of 4 checkpoints do not go on as they did; the worst is .* all are in"):
        ResumeVerification(contexts[0].run.job, contexts[0], chosen).run()
    rows = {(pair["source"], pair["target"]): pair for pair in read_json(tmp_path / "verify.json")["pairs"]}
    assert rows["ddp@2", "single@1"]["error"] == "ddp@2 saved nothing: rank 1: out of memory"
    assert rows["single@1", "ddp@2"]["error"] == "ddp@2 failed: rank 0: out of memory"
    assert rows["single@1", "single@1"]["loss_diff"] == 0.5
    assert rows["single@1", "fsdp@2"]["passed"], "fsdp was not undisturbed anywhere, and equals the run that went on"
    assert rows["single@1", "fsdp@2"]["undisturbed_diff"] is None
    assert sorted(exported) == ["fsdp@2", "single@1", "single@1"], "each checkpoint once, and none of those that failed"
    page = (tmp_path / "verify.md").read_text()
    assert "\nLeft out:\n\n- hsdp: needs 4 ranks\n" in page
    assert "| ddp@2 | single@1 | - | - | differs | FAIL: ddp@2 saved nothing" in page


def test_the_first_rank_to_fail_is_the_reason() -> None:
    late, early = {ERROR_KEY: "connection closed", TIME_KEY: 2.0}, {ERROR_KEY: "out of memory", TIME_KEY: 1.0}
    assert error_of({0: late, 1: SOLVED, 2: early}) == "rank 2: out of memory"
    assert error_of({0: SOLVED}) == ""


def test_rank_0_names_the_port_and_the_others_read_it(tmp_path: Path) -> None:
    ports = [FileRendezvous(tmp_path, rank, lambda: None).agree_on_port("case", limit_s=5) for rank in range(2)]
    assert ports[0] == ports[1] > 0


def test_a_rank_beyond_a_case_waits_for_its_next_one_as_much_longer(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def agree(self: FileRendezvous, name: str, *, limit_s: float) -> int:
        limits.append(limit_s)
        raise JobError("far enough")

    monkeypatch.setattr(FileRendezvous, "agree_on_port", agree)
    ranks = ForkedRanks(contexts[1], folder="verify", limit_s=10.0, heartbeat=lambda: None)
    for name in ("a", "b"):
        assert ranks.run_case(name, lambda context: {}, run=contexts[1].run, world_size=1) == {}
    for _ in range(2):
        with pytest.raises(JobError, match="far enough"):
            ranks.run_case("c", lambda context: {}, run=contexts[1].run, world_size=2)
    assert limits == [4 * 70.0, 2 * 70.0], "two cases of up to 10 s that others are in, each with 60 s of slack"


def test_a_folder_is_kept_where_another_attempt_has_one(tmp_path: Path) -> None:
    own, other = tmp_path / "verify" / "1", tmp_path / "verify" / "2"
    for folder in (own, other):
        folder.mkdir(parents=True)
    FileRendezvous(own, 0, lambda: None).finish(world_size=1, limit_s=5)
    assert (own.exists(), other.exists()) == (False, True)


def test_a_rank_that_succeeds_gives_no_reason_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.verification.forked_ranks._FAILURE_GRACE_S", 0.0)
    rendezvous = FileRendezvous(tmp_path, 0, lambda: None)
    watch = rendezvous.failure_watcher("case", world_size=3)
    write_json(rendezvous.answer_of("case", 1), SOLVED)
    assert watch() == ""
    write_json(rendezvous.answer_of("case", 2), FAILED)
    watch()
    assert watch() == "ended because rank 2 had failed"


def test_a_job_whose_cases_all_pass_says_so(
    contexts: list[Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, job = Placement("single", 1), contexts[0].run.job
    answers = {"save_single@1": {0: SOLVED}, "resume_single@1": {0: {"resumed": {"single@1": SOLVED["losses"]}}}}
    answer_instead(monkeypatch, {"reference": {0: SOLVED}, "ddp": {0: SOLVED, 1: SOLVED}, **answers})
    monkeypatch.setattr(resuming, "_exported_logits", lambda folder: "the same")
    Verification(job, contexts[0], SelectedStrategies(sequences=8, cases={"ddp": STRATEGIES["ddp"]})).run()
    page = (tmp_path / "verify.md").read_text()
    assert "| ddp | 0.0e+00 | 0.0e+00 | 1.0e-06 | equal |" in page
    assert "Left out" not in page
    assert "on purpose" not in page
    chosen = ResumePairs(sequences=8, cases={"single": SINGLE_PROCESS}, pairs=((one, one),))
    ResumeVerification(job, contexts[0], chosen).run()
    page = (tmp_path / "verify.md").read_text()
    assert "| single@1 | single@1 | 0.0e+00 | 0.0e+00 | equal | ok |" in page
    assert "Left out" not in page
    printed = capsys.readouterr().out
    assert "all 1 strategies take the steps of one process" in printed
    assert "all 1 checkpoints go on as they did" in printed
