"""Whole runs as jobs of a real Slurm."""

import json
import os
import re
import shutil
import signal
import sys
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
from tests.torchless import brief, endless, wait_for_answers

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


def test_a_sweep_is_one_array_whose_results_are_collected(cluster, launch_forked, tmp_path):
    words = ("backend=slurm", *brief(tmp_path), "backend.max_parallel=2", "job.seed=1,2,3", "run.name=grid")
    ended = launch_forked("-m", *words, "backend.wait=true", env=cluster.env).expect(0)
    (folder,) = tmp_path.glob("runs/grid/sweep-*")
    (script,) = folder.glob("*.sbatch")
    assert "#SBATCH --array=0-2%2\n" in script.read_text()
    runs = [folder / f"{number:03d}" for number in range(3)]
    jobs = [cluster.job(run_dir) for run_dir in runs]
    array = jobs[0].removesuffix("_0")
    assert jobs == [f"{array}_{number}" for number in range(3)]
    for job, run_dir in zip(jobs, runs, strict=True):
        assert read_json(run_dir / "result.json")["status"] == "completed"
        assert f"slurm.{job}.log" in [path.name for path in run_dir.glob("logs/slurm.*")]
        (host,) = read_json(run_dir / "plan.json")["hosts"]
        assert host["host"]["cores"] == 1, "what Slurm allocates by default, however many the machine has"
    assert statuses(folder) == ["completed"] * 3
    assert f"job array {array} is queued: 3 runs, at most 2 at a time" in ended.stdout


def statuses(sweep: Path) -> list[str]:
    """Return the statuses of the runs in the table of a sweep."""
    return [trial["status"] for trial in read_json(sweep / "sweep.json")["trials"]]


def test_one_task_of_an_array_is_cancelled_and_another_one_queued_again(cluster, launch_forked, tmp_path):
    words = ("backend=slurm", *endless(tmp_path), "job.seed=1,2", "run.name=grid")
    launch_forked("-m", *words, env=cluster.env, timeout=60).expect(0)
    (folder,) = tmp_path.glob("runs/grid/sweep-*")
    runs = first, second = folder / "000", folder / "001"
    for run_dir in runs:
        wait_for_answers(run_dir, ranks=1)
    job = cluster.job(first)
    assert f"squeue --jobs={job}" in launch_forked("status", str(first), env=cluster.env).expect(0).stdout
    assert statuses(folder) == ["submitted"] * 2
    launch_forked("cancel", str(first), env=cluster.env).expect(0)
    wait_for((first / "result.json").exists)
    wait_for(lambda: statuses(folder) == ["preempted", "submitted"], seconds=30)  # its answers are kept
    assert cluster.state_of(cluster.job(second)) == "RUNNING"
    cluster.ask("scancel", "--signal=USR1", "--batch", cluster.job(second))
    log = second / "logs" / f"slurm.{cluster.job(second)}.log"
    wait_for(lambda: f"job {cluster.job(second)} is requeued" in log.read_text())
    answers = second / "generated" / "rank0.part"
    num_bytes = answers.stat().st_size
    wait_for(lambda: answers.stat().st_size > num_bytes, seconds=240)
    launch_forked("cancel", str(second), env=cluster.env).expect(0)
    wait_for(lambda: is_over(cluster, second))
    wait_for(lambda: statuses(folder) == ["preempted"] * 2, seconds=30)


def test_setup_prepares_every_node_and_a_line_that_fails_ends_the_job(cluster, launch_forked, tmp_path):
    words = ("backend=slurm", *brief(tmp_path), "backend.wait=true")
    marks = tmp_path / "marks"
    lines = f"['export MARK=kept','echo $MARK on $(hostname) >> {marks}']"
    more = ("backend.nodes=2", "backend.cpus_per_task=2", "run.dir=good")
    launch_forked(*words, *more, f"backend.setup={lines}", env=cluster.env).expect(0)
    cores = [host["host"]["cores"] for host in read_json(tmp_path / "good" / "plan.json")["hosts"]]
    assert cores == [min(2, len(os.sched_getaffinity(0)))] * 2
    assert {"kept on n1", "kept on n2"} == set(marks.read_text().splitlines())
    ended = launch_forked(*words, "backend.setup=['true','ls /nothing/of/this']", "run.dir=bad", env=cluster.env)
    ended.expect(69)
    message = "backend.setup: this line ended with exit code 2: ls /nothing/of/this"
    assert ended.stdout.count(message) == 1
    assert read_json(tmp_path / "bad" / "result.json")["status"] == "failed"
    assert read_json(tmp_path / "bad" / "failure.json")["reason"] == message
    assert message in launch_forked("status", "bad").expect(0).stdout
    assert not (tmp_path / "bad" / "logs" / "n1.0.log").exists()


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_agents_and_ranks_run_in_a_container(kind, cluster, launch_forked, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "image").touch()
    program = tmp_path / "bin" / {"pyxis": "srun", "apptainer": "apptainer"}[kind]
    program.write_text(
        {"pyxis": SRUN_WITH_PYXIS, "apptainer": APPTAINER}[kind].replace("REAL", shutil.which("srun") or "")
    )
    program.chmod(0o755)
    env = {**cluster.env, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    inside = (f"backend.container={kind}", f"backend.image={tmp_path}/image", f"backend.python={sys.executable}")
    more = f"backend.container_mounts=['{tmp_path}/bin:/opt:ro']"
    words = ("backend=slurm", *brief(tmp_path), "backend.nodes=2", "backend.wait=true", "run.dir=held")
    launch_forked(*words, *inside, more, env=env).expect(0)
    calls = [line.split("|") for line in (tmp_path / "bin" / "calls").read_text().splitlines()]
    assert {node for node, *_ in calls} == {"n1", "n2"}
    for _, image, mounts, workdir, command in calls:
        assert (image, workdir) == (f"{tmp_path}/image", str(tmp_path))
        assert {f"{tmp_path}:{tmp_path}", f"{tmp_path}/bin:/opt:ro"} <= set(mounts.split(","))
        assert command.startswith(f"{sys.executable} -m launcher.")
    modules = {command.split()[2] for *_, command in calls}
    assert "launcher.supervision.agent_supervisor" in modules
    assert "launcher.backends.slurm.entrypoint" not in modules


APPTAINER = """#!/bin/sh
[ "$1" = exec ] && [ "$2" = --bind ] && [ "$4" = --pwd ] || exit 90
mounts=$3 workdir=$5 image=$6
shift 6
[ -e "$image" ] && cd "$workdir" || exit 91
echo "$SLURMD_NODENAME|$image|$mounts|$workdir|$*" >> "${0%/*}/calls"
exec "$@"
"""
"""What ``apptainer exec`` does, without a container."""
SRUN_WITH_PYXIS = """#!/bin/bash
for word; do
    case $word in
        --container-image=*) image=${word#*=} ;;
        --container-mounts=*) mounts=${word#*=} ;;
        --container-workdir=*) workdir=${word#*=} ;;
        --nodelist=*) node=${word#*=} rest+=("$word") ;;
        -*) rest+=("$word") ;;
        *) break ;;
    esac
    shift
done
[ -e "$image" ] && cd "$workdir" || exit 91
echo "$node|$image|$mounts|$workdir|$*" >> "${0%/*}/calls"
exec REAL "${rest[@]}" "$@"
"""
"""srun with the options that pyxis adds to it."""
