"""Runs on hosts that do not share the disk of the launching machine: what they write arrives all the same."""

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launcher.utils.files import read_json, sha256_of
from tests.conftest import REPOSITORY

SMALL = (
    *("backend.threads=1", "data=synthetic", "job.log_every=1", "job.eval_every=0", "job.steps=4"),
    *(
        "model.num_hidden_layers=1",
        "model.hidden_size=32",
        "model.max_position_embeddings=32",
        "job.sequence_length=16",
        "job.micro_batch=2",
    ),
    *("job.eval_sequences=4", "job.sample_tokens=4", "schedule.warmup_steps=2"),
)
WITHOUT_CHECKPOINTS = ("checkpoint.every=0", "checkpoint.at_end=false")


@pytest.fixture(scope="module")
def plain_lab(lab_hosts_of_module):
    return lab_hosts_of_module(2, has_private_tmp=True, environment={"XDG_CACHE_HOME": "/tmp/cache"})


@pytest.fixture
def lab(plain_lab, fork_on):
    """Those hosts, where interpreters are forked."""
    fork_on(plain_lab)
    return plain_lab


FOR_EVER = ("job.steps=1000000", *WITHOUT_CHECKPOINTS)


def over_ssh(lab, *words):
    return ("backend=ssh", f"backend.hostfile={lab.hostfile}", f"backend.ssh_config={lab.ssh_config}", *SMALL, *words)


def lines_without_times(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name.startswith(("train/", "eval/", "base"))} for line in lines]


def test_what_two_hosts_write_arrives(lab, launch_forked, tmp_path):
    ended = launch_forked(*over_ssh(lab, "tracker=wandb", *WITHOUT_CHECKPOINTS, "run.dir=apart")).expect(0)
    launch_forked(*SMALL, "backend.ranks=2", "tracker=local", "run.dir=here").expect(0)
    apart, here = tmp_path / "apart", tmp_path / "here"
    assert lines_without_times(apart) == lines_without_times(here)
    result, expected = read_json(apart / "result.json"), read_json(here / "result.json")
    assert result["status"] == "completed"
    assert result["metrics"]["eval/loss"] == expected["metrics"]["eval/loss"]
    assert (apart / "loss.png").read_bytes()[-8:-4] == b"IEND"
    logs = {path.name for path in (apart / "logs").glob("*.log")}
    assert logs == {"node1.0.log", "node1.agent.log", "node2.1.log", "node2.agent.log"}
    assert "step 4/4" in (apart / "logs" / "node1.0.log").read_text()
    there = lab.run("node1", ["cat", f"{apart}/metrics.jsonl"]).stdout
    assert there == (apart / "metrics.jsonl").read_text()
    hashed = lab.run("node1", ["sh", "-c", f"cd {apart} && find wandb -type f -exec sha256sum {{}} +"]).stdout
    assert ".wandb\n" in hashed
    for line in hashed.splitlines():
        found, name = line.split(maxsplit=1)
        assert sha256_of((apart / name).read_bytes()) == found, name
    assert not list(apart.rglob("*.arriving"))
    assert "tracker" in ended.output


def test_a_killed_rank_is_named_and_the_logs_are_there(lab, launch_forked_in_background, tmp_path):
    running = launch_forked_in_background(*over_ssh(lab, "tracker=local", *FOR_EVER, "run.dir=killed"))
    running.wait_for_output("step 20/")
    pid = next(pid for pid, command in lab.processes("node2").items() if is_rank(pid, command))
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    assert running.wait() == 137, running.output
    failure = read_json(tmp_path / "killed" / "failure.json")
    assert (failure["host"], failure["rank"], failure["signal"]) == ("node2", 1, 9)
    assert Path(failure["log"]).is_file()
    log = tmp_path / "killed" / "logs" / "node1.0.log"
    assert log.read_text() == lab.run("node1", ["cat", str(log)]).stdout
    assert "step 20/" in log.read_text()
    last = lines_without_times(tmp_path / "killed")[-1]["train/step"]
    assert last >= 20
    assert read_json(tmp_path / "killed" / "result.json")["metrics"]["train/step"] == last


def is_rank(pid, command):
    """Whether a process is the child of a rank monitor."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return "launcher.jobs.rank" in command and b"launcher.jobs.rank" in Path(f"/proc/{parent}/cmdline").read_bytes()


def test_checkpoints_of_several_hosts_are_refused(lab, launch_forked, tmp_path):
    words = ("checkpoint.every=2", "checkpoint.at_end=true", "backend.restarts=1", "run.dir=refused")
    ended = launch_forked(*over_ssh(lab, *words)).expect(2)
    for option in ("checkpoint.every=2", "checkpoint.at_end=True", "backend.restarts=1"):
        assert option in ended.stderr
    assert "node1, node2" in ended.stderr
    assert "run.root" in ended.stderr
    assert not (tmp_path / "refused").exists()


def test_a_cancelled_run_claims_no_checkpoint(lab, launch_forked_in_background, tmp_path):
    running = launch_forked_in_background(*over_ssh(lab, "tracker=local", *FOR_EVER, "run.dir=cancelled"))
    running.wait_for_output("step 2/")
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    logs = "".join(log.read_text() for log in (tmp_path / "cancelled" / "logs").glob("node*.log"))
    assert "rank 1 does not see" in logs
    assert "resume" not in running.output
    assert read_json(tmp_path / "cancelled" / "result.json")["status"] == "cancelled"


def test_one_host_keeps_its_checkpoints_and_restarts_from_them(lab, launch_forked_in_background, tmp_path):
    words = ("backend.include=node2", "checkpoint.every=5", "backend.restarts=1", "job.steps=200", "tracker=local")
    running = launch_forked_in_background(*over_ssh(lab, *words, "run.dir=alone"))
    running.wait_for_output("checkpoint ")
    pid = next(pid for pid, command in lab.processes("node2").items() if is_rank(pid, command))
    subprocess.run(["kill", "-KILL", str(pid)], check=True)
    assert running.wait(timeout=200) == 0, running.output
    assert "checkpoints stay there" in running.output
    assert "continuing after step" in running.output
    assert not (tmp_path / "alone" / "checkpoints").exists()
    assert "step_00000200" in lab.run("node2", ["ls", f"{tmp_path}/alone/checkpoints"]).stdout
    assert [line["train/step"] for line in lines_without_times(tmp_path / "alone") if "train/loss" in line] == list(
        range(1, 201)
    )


def test_the_working_tree_is_sent(plain_lab, launch, tmp_path):
    """The interpreter there has every package but this one, and the tree holds what was never committed."""
    tree = tmp_path / "tree"
    for name in ("launcher", "conf"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    git = ("git", "-C", tree, "-c", "user.name=x", "-c", "user.email=x@example.org")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "all")):
        subprocess.run([*git, *words], check=True)
    with (tree / "launcher" / "config" / "job" / "train.py").open("a") as file:
        file.write("\nprint('edited and not committed')\n")
    python = stranger(plain_lab.folder / "stranger")
    words = ("backend.code=sent", f"backend.python={python}", "tracker=local", *WITHOUT_CHECKPOINTS)
    env = {"PYTHONPATH": str(tree)}
    ended = launch(*over_ssh(plain_lab, *words, "run.dir=sent"), env=env).expect(0)
    for log in ("node1.0.log", "node2.1.log"):
        assert "edited and not committed" in (tmp_path / "sent" / "logs" / log).read_text()
    shown = launch("plan", *over_ssh(plain_lab, *words, "run.dir=other"), env=env).expect(0).stdout
    (code,) = {word for line in events(tmp_path / "sent") for word in line.split() if word.startswith("/tmp/cache/")}
    assert f"SHA-256 {Path(code).name}" in shown
    assert read_json(tmp_path / "sent" / "result.json")["metrics"]["train/step"] == 4
    assert not ended.stderr.count("error")


def stranger(folder):
    """Make an interpreter that knows the packages of this one, but not ours; return its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "launcher" not in package.name:
            (packages / package.name).symlink_to(package)
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", "import launcher"], cwd=folder, capture_output=True, text=True, check=False)
    assert "No module named 'launcher'" in found.stderr
    return python


def events(run_dir):
    return [json.loads(line)["what"] for line in (run_dir / "timeline.jsonl").read_text().splitlines()]
