"""Whole runs as jobs of a real Slurm."""

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.registry import executor_of
from launcher.config.compose import compose
from launcher.execution.lifecycle import start_run
from launcher.execution.prepare import prepare
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_json
from tests.backends import contract
from tests.helpers import wait_for
from tests.torchless import endless, wait_for_answers

from .conftest import SMALL

FOR_EVER = ("job.steps=1000000", "checkpoint.every=0")


def losses_in_order(run_dir: Path) -> list[tuple[int, float]]:
    """Return step and loss of every line that has one, in the order of the file."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["train/step"], line["train/loss"]) for line in lines if "train/loss" in line]


def has_begun(run_dir: Path) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(losses_in_order(run_dir)) > 2


def is_over(cluster, run_dir: Path) -> bool:
    return cluster.state_of(cluster.job(run_dir)) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")


class TestContract(contract.ForkedBackendContract):
    takes_part = ("#SBATCH --nodes=2\n",)  # which ones, Slurm decides

    @pytest.fixture
    def words(self):
        return ("backend=slurm", "backend.nodes=2")

    @pytest.fixture
    def run(self, words, plain_cluster, launch, tmp_path):
        return self.starting(launch, words, plain_cluster, tmp_path)

    @pytest.fixture
    def failing_run(self, words, cluster, launch_forked, tmp_path):
        return self.starting(launch_forked, words, cluster, tmp_path)

    def starting(self, launch, words, cluster, tmp_path):
        def start(*more):
            ended = launch(*contract.SMALL, *words, "backend.wait=true", "run.dir=far", *more, env=cluster.env)
            run_dir = tmp_path / "far"
            assert [host["host"]["name"] for host in read_json(run_dir / "plan.json")["hosts"]] == ["n1", "n2"]
            assert cluster.state_of(cluster.job(run_dir)) == ("FAILED" if ended.returncode else "COMPLETED")
            return ended.returncode, ended.output, RunDir(run_dir)

        return start

    @pytest.fixture
    def left(self, plain_cluster):
        return plain_cluster.working


def test_a_job_asked_to_save_is_queued_again_and_continues_as_the_same_run(cluster, launch_forked, tmp_path):
    words = (*SMALL, "job.steps=150")
    queued = launch_forked(*words, "backend.nodes=2", "run.dir=cut", env=cluster.env, timeout=60).expect(0)
    assert "launch status" in queued.stdout
    run_dir = tmp_path / "cut"
    run_id, job_id = read_json(run_dir / "plan.json")["run_id"], cluster.job(run_dir)
    wait_for(lambda: has_begun(run_dir))
    cluster.ask("scancel", "--signal=USR1", "--batch", job_id)
    log = run_dir / "logs" / f"slurm.{job_id}.log"
    wait_for(lambda: "is requeued" in log.read_text())
    assert len(losses_in_order(run_dir)) < 150, "it was over before it could be signalled"
    wait_for(lambda: is_over(cluster, run_dir), seconds=240)
    result = read_json(run_dir / "result.json")
    assert (result["status"], result["run_id"]) == ("completed", run_id)
    assert "continuing after step" in log.read_text()
    launch_forked(*words, "backend=local", "backend.ranks=2", "run.dir=whole").expect(0)
    assert losses_in_order(run_dir) == losses_in_order(tmp_path / "whole")


def test_500_strings_arrive_and_a_cancelled_job_leaves_nothing(
    cluster, launch_forked, tmp_path, monkeypatch, capfd, nasty_strings
):
    sent = {f"NASTY_{number}": value for number, value in enumerate(nasty_strings)}
    forwarded = {f"HF_NASTY_{number}": value for number, value in enumerate(nasty_strings)}
    for name, value in {**forwarded, **cluster.env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    composed = compose(("backend=slurm", *endless(tmp_path), "backend.nodes=2", "run.dir=nasty"))
    run = replace(composed.run, backend=replace(composed.run.backend, env=sent))
    prepared = prepare(replace(composed, run=run))
    assert start_run(prepared, executor_of(prepared.run)) == 0
    run_dir = tmp_path / "nasty"
    wait_for_answers(run_dir)
    found = [environ for environ in map(environ_of, cluster.working()) if "RANK" in environ]
    assert {environ["RANK"] for environ in found} == {"0", "1"}
    for environ in found:
        assert {name: environ.get(name) for name in sent} == sent
        assert {name: environ.get(name) for name in forwarded} == forwarded
    for file in run_dir.glob("*"):  # values that came from the shell may be secrets
        if file.is_file():
            assert "HF_NASTY_7=" not in file.read_text(errors="replace")
    assert f"squeue --jobs={cluster.job(run_dir)}" in launch_forked("status", "nasty", env=cluster.env).expect(0).stdout
    launch_forked("cancel", "nasty", env=cluster.env).expect(0)
    wait_for(lambda: is_over(cluster, run_dir))
    wait_for(lambda: not cluster.working(), seconds=30)
    assert cluster.state_of(cluster.job(run_dir)) == "CANCELLED"
    assert "is requeued" not in next(run_dir.glob("logs/slurm.*.log")).read_text()


def environ_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode().partition("=")[::2] for entry in entries if entry)


def test_ctrl_c_while_waiting_cancels_the_job(cluster, launch_forked_in_background, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    words = ("backend=slurm", *endless(tmp_path), "backend.nodes=1", "backend.wait=true", "run.dir=stopped")
    running = launch_forked_in_background(*words)
    wait_for_answers(tmp_path / "stopped", ranks=1)
    running.send_signal(signal.SIGINT)
    code = running.wait(timeout=120)
    assert code == read_json(tmp_path / "stopped" / "result.json")["exit_code"] != 0
    assert cluster.state_of(cluster.job(tmp_path / "stopped")) == "CANCELLED"
    assert not cluster.working()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("backend.partition=nope", r"backend\.partition=nope: there is no partition nope; the partitions are main"),
        ("backend.nodes=3", r"backend\.nodes=3: partition main has 2"),
        ("backend.gpus_per_node=9", r"backend\.(gpus_per_node=9|nodes=1): Slurm reports: "),
        ("backend.nodelist=n9", r"backend\.nodelist=n9: Slurm reports: .*node"),
        ("backend.mem=900G", r"backend\.mem=900G: Slurm reports: "),
    ],
)
def test_what_slurm_refuses_is_reported_by_option_and_leaves_nothing(cluster, launch_forked, tmp_path, word, message):
    refused = launch_forked(*SMALL, word, "run.dir=refused", env=cluster.env).expect(2)
    assert re.search(message, refused.stderr, re.IGNORECASE), refused.stderr
    assert not (tmp_path / "refused").exists()
    assert cluster.ask("squeue", "--noheader") == ""


def test_a_time_over_the_limit_of_its_partition_is_refused(cluster, launch_forked, tmp_path):
    words = ("backend.partition=short", "backend.time=01:00:00", "run.dir=long")
    refused = launch_forked(*SMALL, *words, env=cluster.env).expect(2)
    assert "backend.time=01:00:00: partition short allows 5:00" in refused.stderr
    assert not (tmp_path / "long").exists()


def test_a_machine_without_slurm_is_detected(launch_forked, tmp_path):
    refused = launch_forked(*SMALL, "run.dir=none", env={"PATH": "/nowhere"}).expect(2)
    assert "sinfo is not installed on this machine" in refused.stderr
    assert not (tmp_path / "none").exists()


def test_a_queued_run_is_not_queued_twice(cluster, launch_forked, tmp_path):
    launch_forked(*SMALL, *FOR_EVER, "run.dir=once", "backend.sbatch_options=[--hold]", env=cluster.env).expect(0)
    refused = launch_forked("resume", "once", env=cluster.env).expect(2)
    assert "of this run is still queued or running" in refused.stderr
    assert (tmp_path / "once" / "job.sbatch").exists()
    launch_forked("cancel", "once", env=cluster.env).expect(0)


def test_every_character_of_an_option_reaches_slurm(cluster, tmp_path, nasty_strings):
    from launcher.backends.slurm.sbatch import _set

    texts = ["".join(letter for letter in text if letter.isprintable()) for text in nasty_strings]
    for text in filter(None, texts[:60]):
        file = tmp_path / "job"
        file.write_text(f"#!/bin/sh\n#SBATCH --hold\n#SBATCH --{_set('comment', text)}\n")
        job_id = cluster.ask("sbatch", "--parsable", str(file))
        assert cluster.ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%k") == text.strip()
        cluster.ask("scancel", job_id)


def test_a_node_that_dies_is_named_at_once(doomed_cluster, launch_forked, tmp_path):
    words = ("backend=slurm", *endless(tmp_path), "backend.nodes=2", "run.dir=dead")
    launch_forked(*words, env=doomed_cluster.env, timeout=60).expect(0)
    run_dir = tmp_path / "dead"
    wait_for_answers(run_dir)
    doomed_cluster.fail("n2")
    failed_at = time.monotonic()
    wait_for((run_dir / "result.json").exists, seconds=30)
    assert time.monotonic() - failed_at < 15
    failure = read_json(run_dir / "failure.json")
    assert failure["host"] == "n2"
    wait_for(lambda: not doomed_cluster.working(), seconds=30)
