"""Sweeps as job arrays, as text, and the table of their results: no Slurm needed."""

import json
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.registry import executor_of
from launcher.backends.slurm import client, entrypoint, submit
from launcher.backends.slurm.client import JobState
from launcher.backends.slurm.sbatch import _ranges, render_array
from launcher.backends.slurm.submit import follow_arrays, sbatch_error
from launcher.config.backend.slurm import SlurmBackend
from launcher.execution.sweep import plan_sweep, render_arrays, run_sweep
from launcher.protocol.rundir import RunDir
from launcher.runs.sweeps import collect_results, read_sweep
from launcher.utils.files import read_json, write_json

WORDS = ("backend=slurm", "tracker=local", "job.steps=1")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((0,), "0"), ((0, 1, 2), "0-2"), ((0, 2, 3, 7), "0,2-3,7"), (tuple(range(5, 900)), "5-899")],
)
def test_numbers_of_tasks(numbers, text):
    assert ",".join(_ranges(numbers)) == text


def test_the_script_of_an_array(plan_of):
    backend = SlurmBackend(max_parallel=4, setup=("true",))
    plan = plan_of("tracker=local", "backend.ranks=1", hosts=backend.hosts(max_ranks=None))
    text = render_array(backend, plan, folder=Path("/runs/50% of it/sweep-1"), tasks=(0, 1, 5))
    lines = text.splitlines()
    assert lines[1:3] == ['#SBATCH --job-name="50% of it"', "#SBATCH --array=0-1,5%4"]
    assert '#SBATCH --output="/runs/50%% of it/sweep-1/%3a/logs/slurm.%A_%a.log"' in lines
    assert lines[-1].endswith("-P -m launcher.backends.slurm.entrypoint --array '/runs/50% of it/sweep-1'")
    (record,) = [line for line in lines if "--setup-failed" in line]
    assert record.strip().endswith("--array '/runs/50% of it/sweep-1' --setup-failed \"$launcher_message\"")


def test_runs_that_ask_slurm_for_different_things_are_different_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, trials = plan_sweep([*WORDS, "backend.nodes=1,2", "backend.threads=1,2"], config_dir=None)
    text = render_arrays(trials, executor_of)
    arrays = [line for line in text.splitlines() if "--array=" in line]
    assert arrays == ["#SBATCH --array=0-1", "#SBATCH --array=2-3"]  # threads are no option of sbatch
    for other in (["backend.array=false"], ["backend=local"]):
        _, trials = plan_sweep([*WORDS, *other, "job.seed=1,2"], config_dir=None)
        assert render_arrays(trials, executor_of) == ""


def answering(answers, monkeypatch):
    """Let Slurm's programs answer by their name; return the commands."""
    asked = []

    def run_slurm(command, **_options):
        asked.append(list(command))
        code, text = answers[command[0]]
        return subprocess.CompletedProcess(command, code, *(("", text) if code else (text, "")))

    monkeypatch.setattr(client, "run_slurm", run_slurm)
    monkeypatch.setattr(submit, "run_slurm", run_slurm)
    return asked


def test_an_array_is_queued_once_with_a_directory_for_each_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = answering({"sinfo": (0, "main*|infinite|4\n"), "sbatch": (0, "77\n")}, monkeypatch)
    sweep, trials = plan_sweep([*WORDS, "job.seed=1,2"], config_dir=None)
    assert run_sweep(sweep, trials, executor_of) == 0
    assert [command[0] for command in asked] == ["sinfo", "sbatch"]
    folder = trials[0].prepared.directory.path.parent
    assert Path(asked[1][-1]) == folder / "array_000.sbatch"
    for number in range(2):
        run_dir = RunDir(folder / f"{number:03d}")
        assert run_dir.snapshot.exists()
        assert read_json(run_dir.session)["job"] == {"id": f"77_{number}"}
        assert not list(run_dir.path.glob(".lock")), "the task takes it"
    assert "job array 77 is queued: 2 runs" in capsys.readouterr().out
    assert [trial.status for trial in read_sweep(folder).trials] == ["submitted"] * 2


def test_a_rejected_array_leaves_no_run_and_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answering({"sinfo": (0, "main*|infinite|1\n"), "sbatch": (0, "78\n")}, monkeypatch)
    sweep, trials = plan_sweep([*WORDS, "backend.nodes=2,1"], config_dir=None)
    assert run_sweep(sweep, trials, executor_of) == 2
    folder = trials[0].prepared.directory.path.parent
    assert "backend.nodes=2: partition main has 1" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["001"]
    assert [trial.status for trial in read_sweep(folder).trials] == ["failed", "submitted"]


def test_an_array_that_sbatch_rejects_leaves_its_table_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answering({"sinfo": (0, "main*|infinite|1\n"), "sbatch": (1, "sbatch: error: Invalid account\n")}, monkeypatch)
    sweep, trials = plan_sweep([*WORDS, "backend.account=x", "job.seed=1,2"], config_dir=None)
    assert run_sweep(sweep, trials, executor_of) == 2
    folder = trials[0].prepared.directory.path.parent
    assert "backend.account=x: Slurm reports: Invalid account" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_too_many_runs_for_an_array():
    error = sbatch_error(SlurmBackend(), "Batch job submission failed: Invalid job array specification")
    assert str(error).startswith("sweep: Slurm reports: Batch job")
    assert "MaxArraySize" in str(error)


def sweep_of_two(folder: Path) -> None:
    rows = [
        {"overrides": [f"job.seed={number}"], "run_dir": f"/elsewhere/{number:03d}", "exit_code": 0}
        for number in range(2)
    ]
    rows = [{**row, "status": "submitted", "eval/loss": None} for row in rows]
    write_json(folder / "sweep.json", {"metric": "eval/loss", "goal": "minimize", "trials": rows})
    (folder / "001").mkdir()
    ended = {"status": "completed", "exit_code": 0, "metrics": {"eval/loss": 2.5}}
    write_json(folder / "001" / "result.json", ended)


def test_the_table_gets_the_results_of_runs_that_have_ended(tmp_path):
    sweep_of_two(tmp_path)
    found = read_sweep(tmp_path)  # current, whichever task has written the file last
    assert [(trial.status, trial.value) for trial in found.trials] == [("submitted", None), ("completed", 2.5)]
    assert found.best is not None
    assert found.best.value == 2.5
    collect_results(tmp_path)
    rows = read_json(tmp_path / "sweep.json")["trials"]
    assert [(row["status"], row["eval/loss"]) for row in rows] == [("submitted", None), ("completed", 2.5)]


def test_a_task_writes_its_result_into_the_table(tmp_path, monkeypatch):
    sweep_of_two(tmp_path)
    (tmp_path / "000").mkdir()
    write_json(tmp_path / "000" / "plan.json", {"run_id": "r"})
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "9"}.items():
        monkeypatch.setenv(name, value)
    assert entrypoint.job_id() == "7_0"
    monkeypatch.setattr("sys.argv", ["entrypoint", "--array", str(tmp_path), "--setup-failed", "backend.setup: x"])
    entrypoint.main()
    failure = json.loads((tmp_path / "000" / "failure.json").read_text())
    assert (failure["reason"], failure["exit_code"]) == ("backend.setup: x", 69)
    assert failure["log"] == str(tmp_path / "000" / "logs" / "slurm.7_0.log")
    rows = read_json(tmp_path / "sweep.json")["trials"]
    assert [row["status"] for row in rows] == ["failed", "completed"]


def test_waiting_ends_with_the_last_task(plan_of, tmp_path, monkeypatch, capsys):
    backend = SlurmBackend()
    plan = plan_of("tracker=local", "backend.ranks=1", hosts=backend.hosts(max_ranks=None))
    plans = {number: replace(plan, run_dir=str(tmp_path / f"{number:03d}")) for number in range(3)}
    (tmp_path / "000").mkdir()
    write_json(tmp_path / "000" / "result.json", {"exit_code": 7})
    lines = {"7_0": "FAILED", "7_1": "RUNNING"}  # Slurm has forgotten 7_2
    asked = []

    def states(job):
        asked.append(job)
        if len(asked) > 1:
            lines["7_1"] = "TIMEOUT"
        return {task: JobState(name=name) for task, name in lines.items()}

    monkeypatch.setattr(submit, "array_states", states)
    monkeypatch.setattr(submit, "_ASK_S", 0.01)
    assert follow_arrays({"7": plans}) == {0: 7, 2: 1, 1: 124}
    assert f"{tmp_path}/000 ended with exit code 7\n" in capsys.readouterr().out
    assert asked == ["7", "7"]


def test_a_signal_while_waiting_cancels_every_array(plan_of, tmp_path, monkeypatch):
    backend = SlurmBackend()
    plan = plan_of("tracker=local", "backend.ranks=1", hosts=backend.hosts(max_ranks=None))
    plans = {number: replace(plan, run_dir=str(tmp_path / f"{number:03d}")) for number in range(2)}
    asked = answering({"scancel": (0, "")}, monkeypatch)

    def states(job):
        if not asked:
            signal.raise_signal(signal.SIGINT)
        return {f"{job}_{number}": JobState(name="CANCELLED" if asked else "RUNNING") for number in range(2)}

    monkeypatch.setattr(submit, "array_states", states)
    assert follow_arrays({"7": {0: plans[0]}, "8": {1: plans[1]}}) == {0: 130, 1: 130}
    assert asked == [["scancel", "--", "7", "8"]]


def test_states_of_tasks(monkeypatch):
    answering({"squeue": (0, "7_0|PENDING|JobArrayTaskLimit\n7_1|RUNNING|None\n")}, monkeypatch)
    assert client.array_states("7") == {
        "7_0": JobState(name="PENDING", reason="JobArrayTaskLimit"),
        "7_1": JobState(name="RUNNING"),
    }
    answering({"squeue": (1, "slurm_load_jobs error: Invalid job id specified\n")}, monkeypatch)
    assert client.array_states("7") == {}
